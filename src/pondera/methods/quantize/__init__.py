"""Quantizers, from vectors to discrete codes. One file per method; `base.py` defines the interface."""
