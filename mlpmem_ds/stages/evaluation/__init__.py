"""Scores of every arm from one pass, generation, lm-evaluation-harness."""
