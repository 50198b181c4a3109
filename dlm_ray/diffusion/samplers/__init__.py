"""Rules (what one denoising step reveals) over the whole row at once, or block by block over a KV cache."""
