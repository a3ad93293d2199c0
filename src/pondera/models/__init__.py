"""Models: a Hugging Face decoder as a backbone, and AdaptiveLM, which adds methods to it."""
