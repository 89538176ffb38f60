"""What a run will cost, and what a directory holds."""
