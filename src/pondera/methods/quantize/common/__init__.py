"""What quantizers share: finding codes, learning codebooks, storing codes and telling how healthy a codebook is."""
