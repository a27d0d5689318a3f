"""What is minimized, and how."""
