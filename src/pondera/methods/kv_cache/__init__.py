"""How much of the past is remembered: one file per method, `contract.py` is the seam."""
