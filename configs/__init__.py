"""Recipes: one file is one run."""
