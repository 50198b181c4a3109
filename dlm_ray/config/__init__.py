"""Frozen configuration trees: what a recipe may say, and the errors that people are told."""

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.recipe import Recipe

__all__ = ["DamageError", "Recipe", "UserError"]
