"""The command line: one file per group of commands, and how their results are printed."""
