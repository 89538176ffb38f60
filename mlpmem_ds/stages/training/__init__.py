"""The memory's training under DeepSpeed, and that of a small base."""
