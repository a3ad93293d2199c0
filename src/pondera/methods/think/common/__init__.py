"""Components shared by several think methods."""
