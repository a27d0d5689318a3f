"""Networks that others published, read without running the code in their files."""
