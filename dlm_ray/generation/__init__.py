"""A loaded model with its tokenizer: load, sample, infill, score."""
