"""An AR checkpoint becomes a Denoiser. The only folder that imports transformers' models."""
