"""Components shared by quantizers: nearest-row search, codebook training, packed storage and health measures."""
