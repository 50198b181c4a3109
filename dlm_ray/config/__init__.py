"""Immutable configuration trees (recipes, sweeps, services) and the errors that users see."""

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.recipe import Recipe

__all__ = ["DamageError", "Recipe", "UserError"]
