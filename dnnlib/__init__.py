"""What needs neither torch nor this project: errors, command lines, parsing, files, pictures."""
