"""Builders, oracles and processes that several test files use."""
