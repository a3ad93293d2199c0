"""Components shared by chunk methods."""
