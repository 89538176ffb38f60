"""Into and out of Hugging Face directories, the reference's checkpoints and Arrow files."""
