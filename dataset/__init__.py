"""Data sets: what they are made of, how they are stored and read."""
