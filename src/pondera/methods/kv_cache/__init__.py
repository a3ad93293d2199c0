"""How much of the past is remembered: one file per method, `base.py` is the seam."""
