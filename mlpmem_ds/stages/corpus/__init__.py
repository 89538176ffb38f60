"""Text to tokens: read, split, tokenise."""
