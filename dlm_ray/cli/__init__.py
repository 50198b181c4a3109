"""The command line: one file per group of verbs, and what people see of their results."""
