"""What a sweep measures, how it ranks trials, and its report."""
