"""Rules (what one denoising step reveals) over a canvas (the whole row)."""
