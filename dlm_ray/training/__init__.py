"""One training run: sequences, draws, the step, validation and commits, with or without Ray."""
