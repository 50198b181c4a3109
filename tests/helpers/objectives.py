"""Objectives of a user's own module, which processes on a Ray cluster can import."""

import ray

from dlm_ray.diffusion.objectives import Masked


class CountedMasked(Masked):
    """Masked diffusion that tells the actor `attempts` of every time that a process builds it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        ray.get(ray.get_actor("attempts").add.remote())
