"""What is on disk; README.md beside this file is the specification."""
