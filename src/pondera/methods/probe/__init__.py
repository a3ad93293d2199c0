"""Ways to look at a trained model from outside, one per file."""
