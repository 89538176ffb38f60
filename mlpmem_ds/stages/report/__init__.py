"""What a person reads of an evaluation: page, plots, breakdowns."""
