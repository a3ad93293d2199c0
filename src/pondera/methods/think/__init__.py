"""How much to compute for each token: one file per method, `contract.py` is the seam."""
