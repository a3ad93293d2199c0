"""Quotes: sentences of the user's own files, each with its file and its bytes."""
