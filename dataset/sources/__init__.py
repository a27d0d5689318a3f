"""What data sets are made from, a file for each format."""
