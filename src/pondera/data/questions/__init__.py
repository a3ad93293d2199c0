"""Questions about a long context, to measure what a compressed KV cache still knows: one file per kind."""
