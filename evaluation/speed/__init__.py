"""Speed and memory, as ratios to a named baseline within one run."""
