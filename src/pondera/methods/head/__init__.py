"""Output heads, from final states to logits. One file per method; `base.py` defines the interface."""
