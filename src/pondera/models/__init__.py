"""The model floor: a Hugging Face decoder as a backbone, its caches, and AdaptiveLM on top."""
