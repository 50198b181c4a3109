"""One run: rows, draws, the step, validation, commits. Runs in one process and under torchrun; Ray Train only calls it."""
