"""Tasks with an answer: multiple choice, scored alike for autoregressive and diffusion models."""
