"""Text to tokens: read, split, tokenize."""
