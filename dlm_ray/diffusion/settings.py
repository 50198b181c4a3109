"""The types of a recipe's `objective` section, as `build` and `restore` of an objective take it.

`config.objective` validates the section, and replaces the path of each custom class by the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from dlm_ray.diffusion.absorbing import Process
    from dlm_ray.diffusion.denoiser import Objective
    from dlm_ray.diffusion.schedules import Schedule


class ScheduleSettings(TypedDict):
    """The section `objective.schedule`: the arguments of `schedules.build`."""

    name: str | type[Schedule]
    exponent: float | None
    epsilon_0: float
    epsilon_1: float


class ClipSettings(TypedDict):
    """The section `objective.clip`: the arguments of `absorbing.Clip`."""

    beta: float
    omega: float
    weight: Literal["unbiased", "paper"]
    enforce: Literal["none", "counts"]


class SimplexSettings(TypedDict, total=False):
    """The section `objective.simplex`: arguments of `SsdLm`."""

    block_tokens: int
    scale: float
    num_timesteps: int


class ObjectiveSettings(TypedDict):
    """The section `objective`, complete: a key that the objective does not use has its default."""

    name: str | type[Objective]
    process: type[Process] | None
    schedule: ScheduleSettings
    num_timesteps: int | None
    times: str
    mask_sampler: Literal["bernoulli", "count"]
    draws_per_sequence: int
    clip: ClipSettings | None
    weight: Literal["elbo", "flat", "time"]
    complementary: bool
    context_weights: float | None
    confidence_weight: float
    autoregressive_weight: float
    alignment_weight: float
    shift: bool
    normalize_by: str
    exponents: Literal["per_token", "scalar"]
    estimator: Literal["one_token", "all_masked"]
    posterior_epsilon: float
    simplex: SimplexSettings | None
    block_tokens: int | None
    """K; None for an objective without blocks."""
    context: Literal["clean", "clean_causal", "noisy"]
