"""Text in, text out: a checkpoint with its tokenizer as something that samples, infills and scores."""
