"""Think methods: how much compute each token gets. One file per method; `base.py` defines the interface."""
