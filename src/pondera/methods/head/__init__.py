"""How a state becomes scores of the vocabulary: one file per method, `base.py` is the seam."""
