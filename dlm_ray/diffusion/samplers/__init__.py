"""Samplers: rules that select what a denoising step reveals, on a whole canvas or block by block over a KV cache."""
