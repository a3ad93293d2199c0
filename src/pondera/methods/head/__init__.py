"""How a state becomes scores of the vocabulary: one file per method, `contract.py` is the seam."""
