"""Turns AR checkpoints into Denoisers; the only package that imports transformers' models."""
