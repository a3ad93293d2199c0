"""How much to say at once: one file per method, `base.py` is the seam."""
