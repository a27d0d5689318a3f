"""What needs torch but not this project: distributed start-up, tensor files, random streams."""
