"""What needs training, sampling and metrics together: networks measured as they are made."""
