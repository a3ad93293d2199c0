"""How much to compute for each token: one file per method, `base.py` is the seam."""
