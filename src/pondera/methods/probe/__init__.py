"""Probes: analyses of a trained model from its outputs and traces. One file per probe."""
