"""Synthetic tasks: one file per task, found like methods. The difficulty of each scored token is known."""
