"""The command line: one file per verb, in `main.py` what all of them share."""
