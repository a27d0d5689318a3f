"""Archives, their index, and the writing of them."""
