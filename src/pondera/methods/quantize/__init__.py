"""Discrete codes for vectors: codebooks, how they learn, and what can go wrong with them."""
