"""Checkpoints: tensorstore arrays, the commit and its verification, and Hugging Face folders."""
