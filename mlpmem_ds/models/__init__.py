"""Models: the memory that is trained, the frozen base that it reads, and the two joined for Hugging Face
users."""
