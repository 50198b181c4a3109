"""Dated results, each with hardware, command and recipe."""
