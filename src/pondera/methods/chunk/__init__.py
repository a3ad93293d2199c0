"""How much to say at once: one file per method, `contract.py` is the seam."""
