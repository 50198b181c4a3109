"""The recipe's `objective`: the loss, its noise and its draws.

`OBJECTIVES` is the one table of the built-in objectives: the keys that each uses, its sampling rules and its canvas.
The classes are in `diffusion.objectives`, under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from dlm_ray.config.imports import import_class, is_class_path
from dlm_ray.config.parts import ConfigNode, Positive
from dlm_ray.config.trees import Tree

CanvasKind = Literal["autoregressive", "block", "whole", "simplex"]


@dataclass(frozen=True)
class ObjectiveSpec:
    """What the configuration knows of a built-in objective, without importing torch."""

    keys: frozenset[str]
    """Keys of `objective` that it uses besides those of every objective. Setting any other key is an error."""
    rules: tuple[str, ...]
    """Sampling rules for its models, the default first."""
    canvas: CanvasKind
    """What a sampler denoises at once: one token, one block, all positions, or one block of noise on the simplex."""
    draws_per_sequence: int | None = None
    """Draws of a sequence in a batch; None means that `objective.draws_per_sequence` decides."""


# Keys of the absorbing forward process, for objectives that mask with Bernoulli probabilities from a schedule.
_NOISE = frozenset({"schedule", "times", "draws_per_sequence"})
_MASKS = _NOISE | {"mask_sampler", "clip", "complementary", "normalize_by"}
_LOSSES = frozenset({"process", "weight", "confidence_weight", "autoregressive_weight"})
_ADAPTIVE = ("margin", "threshold", "factor", "entropy_bounded")
_WHOLE = ("confidence", "ancestral", "first_hitting", *_ADAPTIVE)

OBJECTIVES: dict[str, ObjectiveSpec] = {
    "autoregressive": ObjectiveSpec(frozenset(), ("left_to_right",), "autoregressive"),
    "masked": ObjectiveSpec(
        _MASKS | _LOSSES | {"num_timesteps", "context_weights", "alignment_weight"}, _WHOLE, "whole"
    ),
    "block": ObjectiveSpec(
        _MASKS | _LOSSES | {"block_tokens", "context"},
        ("confidence", "first_hitting", "ancestral", *_ADAPTIVE),
        "block",
    ),
    "genmd4": ObjectiveSpec(
        frozenset({"times", "exponents"}), ("state_dependent", "confidence", *_ADAPTIVE), "whole", draws_per_sequence=2
    ),
    "sedd": ObjectiveSpec(_MASKS, ("tweedie", *_WHOLE), "whole"),
    # d3pm and tauldr score other positions than the masked ones, so neither has normalize_by.
    "d3pm": ObjectiveSpec(_NOISE | {"num_timesteps", "posterior_epsilon"}, _WHOLE, "whole"),
    "tauldr": ObjectiveSpec(_NOISE | {"estimator"}, _WHOLE, "whole"),
    "ssd_lm": ObjectiveSpec(frozenset({"times", "simplex"}), ("sampled", "greedy", "multi_hot"), "simplex"),
}
NAMES = tuple(OBJECTIVES)
SCHEDULES = ("linear", "polynomial", "cosine", "cosine_alpha", "geometric", "log", "square", "square_root")

# Attributes that a custom class must have: the protocols of `diffusion` (Objective, Process, Schedule).
_OF_OBJECTIVE: tuple[str, ...] = ("kind", "canvas", "is_causal", "likelihood", "build", "restore", "draw")
_OF_OBJECTIVE += ("evaluation_draw", "count", "token_nll", "forward", "named_parameters")
_OF_PROCESS = ("build", "draw", "evaluation_draw", "inputs")
_OF_SCHEDULE = ("alpha", "alpha_prime", "mask_probability", "weight")


def rules_of(objective: str) -> tuple[str, ...]:
    """Return the sampling rules of an objective, the default first.

    The `kind` of a custom class decides which rules it has. Its path does not tell, so a path gets all rules.
    """
    if objective in OBJECTIVES:
        return OBJECTIVES[objective].rules
    return tuple(dict.fromkeys(rule for spec in (OBJECTIVES["masked"], *OBJECTIVES.values()) for rule in spec.rules))


def resolve_settings(fields: Mapping[str, object]) -> Tree:
    """Return the settings that `build` and `restore` of an objective take: complete, with the classes of class paths.

    Args:
        fields: the `objective` section of a recipe, a manifest or an export; missing keys get their defaults.

    Raises:
        UserError: if a custom class cannot be imported or does not meet its protocol.
    """
    settings: Tree = {**Objective().model_dump(), **fields}
    if settings["name"] not in OBJECTIVES:
        settings["name"] = import_class(settings["name"], "objective.name", allowed=NAMES, requires=_OF_OBJECTIVE)
    if settings["process"] is not None:
        settings["process"] = import_class(settings["process"], "objective.process", requires=_OF_PROCESS)
    schedule = settings["schedule"]
    if schedule["name"] not in SCHEDULES:
        key = "objective.schedule.name"
        custom = import_class(schedule["name"], key, allowed=SCHEDULES, requires=_OF_SCHEDULE)
        settings["schedule"] = {**schedule, "name": custom}
    return settings


class Schedule(ConfigNode):
    """alpha(t): the probability that a token is still clean at time t."""

    name: str = "linear"
    """`linear`, `polynomial`, `cosine` (MD4: 1 - cos(pi/2 (1 - t))), `cosine_alpha` (BD3-LM: cos(pi/2 t)), `geometric`,
    `log`, `square`, `square_root`, or `package.module:Class` for a custom class that is created without arguments and
    has the methods of `diffusion.schedules.Schedule`."""
    exponent: Annotated[float, Field(gt=0.0)] | None = None
    """Exponent of `polynomial`: alpha(t) = 1 - t ** exponent. No other schedule has one."""
    epsilon_0: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """alpha(0) = 1 - epsilon_0 (MD4's code: 1e-4). Reported bounds do not depend on it: they cover the full range."""
    epsilon_1: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """alpha(1) = epsilon_1 (MD4's code: 1e-4; SEDD: 1e-3)."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in SCHEDULES and not is_class_path(name):
            expected = f"{', '.join(SCHEDULES)}, or package.module:Class for a custom class"
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return name


class Clip(ConfigNode):
    """Interval [beta, omega] of t for training (BD3-LM); with the linear schedule t is the mask probability."""

    beta: float
    """Lower end of the interval, in [0, omega)."""
    omega: float
    """Upper end of the interval, in (beta, 1]."""
    weight: Literal["unbiased", "paper"] = "unbiased"
    """`unbiased`: the ELBO's integral over the interval. `paper`: the weights of BD3-LM's code, which omit the constant
    omega - beta and are 1 if beta > 0.5."""
    enforce: Literal["none", "counts"] = "none"
    """`counts`: the masked share of every block is also within [beta, omega], as in BD3-LM's code. The count is drawn
    directly, without the code's rejection loop."""

    def fits(self, block_tokens: int) -> bool:
        """Return whether some whole number of masked tokens in a block of `block_tokens` lies within the interval."""
        least = 0 if self.beta <= 1e-3 else math.ceil(self.beta * block_tokens - 1e-9)
        return least <= math.floor(self.omega * block_tokens + 1e-9)


class Simplex(ConfigNode):
    """The noise of `ssd_lm`."""

    block_tokens: Positive = 25
    """Tokens of the noisy block."""
    scale: Annotated[float, Field(gt=0.0)] = 5.0
    """K: a token has the logit +K at its own entry and -K at all others."""
    num_timesteps: Positive = 5000
    """T: times are on the grid 1/T .. 1."""


class Objective(ConfigNode):
    """The loss that training minimises."""

    name: str = "masked"
    """`autoregressive`, `masked` (MD4, MDLM, DiffuLLaMA), `block` (BD3-LM), `genmd4`, `sedd`, `d3pm`, `tauldr`,
    `ssd_lm`, or `package.module:Class` for a custom class that meets `diffusion.denoiser.Objective`; a subclass of
    `diffusion.objectives.Masked` does. The class is imported wherever a checkpoint is trained, sampled, scored or
    served."""
    process: str | None = None
    """`package.module:Class` of a custom forward process that meets `diffusion.absorbing.Process`; the absorbing
    process (masks) if absent. `masked`, `block` and custom objectives have it."""
    schedule: Schedule = Schedule()
    """alpha(t) of the absorbing process; linear if absent."""
    num_timesteps: Positive | None = None
    """T of discrete time; continuous time if absent (`d3pm`: 1000). Reported bounds are in continuous time."""
    times: Literal["stratified", "antithetic", "independent", "paper"] = "stratified"
    """How the times t of a global batch depend on each other. `paper` is the order of BD3-LM's code, in which the place
    in the batch biases t."""
    mask_sampler: Literal["bernoulli", "count"] = "bernoulli"
    """`count`: k uniform in 1..N, a uniform subset of k of N tokens, weight N/k. It is unbiased and always masks."""
    draws_per_sequence: Positive = 1
    """Draws of every sequence in a batch; training.micro_batch_size counts each of them."""
    clip: Clip | None = None
    """Interval of t for training; the full range if absent."""
    weight: Literal["elbo", "flat", "time"] = "elbo"
    """Weight of a masked token: the ELBO's, or DiffuLLaMA's 1 and t. Reported bounds always use the ELBO's."""
    complementary: bool = False
    """Draws come in pairs, in which each masks what the other leaves clean; draws_per_sequence must be even."""
    context_weights: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """p of Dream's context-adaptive weights (0.3); no such weights if absent."""
    confidence_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """CAP: factor of the entropy at masked tokens whose prediction is already right; 0 turns it off."""
    autoregressive_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Factor of the next-token loss of the same network on the clean sequence, by a second pass with causal attention;
    0 turns it off."""
    alignment_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Factor of 1 - cosine between the states and those of the frozen AR model.base (REPR-ALIGN: 10); 0: off."""
    shift: bool = True
    """The hidden state at position i-1 predicts the token at position i, as in the AR base model (DiffuLLaMA)."""
    normalize_by: Literal["all_tokens", "global_masked"] = "all_tokens"
    """Divisor of the sum over masked tokens. The AR and alignment losses are means over all tokens in either case."""
    exponents: Literal["per_token", "scalar"] = "per_token"
    """GenMD4's learned w: one per token of the vocabulary, or one for all tokens (the ablation)."""
    estimator: Literal["one_token", "all_masked"] = "one_token"
    """tauLDR's estimator: score the token that jumped, or the mean over all masked tokens."""
    posterior_epsilon: Annotated[float, Field(gt=0.0)] = 1e-6
    """D3PM's epsilon, inside the logarithms of its posteriors."""
    simplex: Simplex | None = None
    """The noise of `ssd_lm`; its defaults if absent."""
    block_tokens: Positive | None = None
    """K of `block`, required there: 1 is the autoregressive end, the sequence length is masked diffusion."""
    context: Literal["clean", "clean_causal", "noisy"] = "clean"
    """The blocks before a block, as it sees them: `clean` attends in blocks; `clean_causal` attends causally, as the AR
    base does, so that the base's predictions stay and `autoregressive_weight` costs no pass of its own; `noisy` trains
    on x_t only (BD3-LM's ablation)."""

    @property
    def draws_of_a_row(self) -> int:
        """Draws of a sequence in a batch; GenMD4's masks come in pairs."""
        spec = OBJECTIVES.get(self.name)
        return spec.draws_per_sequence if spec and spec.draws_per_sequence else self.draws_per_sequence

    def contradictions(self, has_base: bool) -> list[str]:
        """Return the errors between the keys of `objective`; those of a custom class follow when it is imported."""
        errors = self.errors_of(self.name) if self.name in OBJECTIVES else []
        schedule = self.schedule
        if (schedule.name == "polynomial") != (schedule.exponent is not None):
            errors.append(
                f"objective.schedule.exponent={schedule.exponent} goes with objective.schedule.name=polynomial and "
                f"with no other, and the name is {schedule.name}; set both or neither"
            )
        clip = self.clip
        if clip is not None and not 0 <= clip.beta < clip.omega <= 1:
            errors.append(
                f"objective.clip: beta={clip.beta}, omega={clip.omega}; allowed is 0 <= beta < omega <= 1, an interval "
                "of t within (0, 1)"
            )
        errors += self._errors_of_draws()
        if self.autoregressive_weight and not self.shift:
            errors.append(
                "objective.autoregressive_weight needs objective.shift=true, as in an autoregressive model; change "
                "either"
            )
        if self.alignment_weight and not has_base:
            errors.append(
                "objective.alignment_weight needs model.base, the frozen autoregressive model to align with; set it or "
                "remove the first"
            )
        return errors

    def errors_of(self, kind: str) -> list[str]:
        """Return the errors of the keys for an objective of a built-in `kind`: unused and missing ones."""
        errors = []
        for key in _SPECIFIC_KEYS:
            if key not in OBJECTIVES[kind].keys and self._is_set(key):
                users = ", ".join(sorted(name for name, spec in OBJECTIVES.items() if key in spec.keys))
                errors.append(
                    f"objective.{key}={_shown(getattr(self, key))} is not used by objective.name={self.name}, only by "
                    f"{users}; remove it"
                )
        if kind == "block" and self.block_tokens is None:
            errors.append(
                f"objective.block_tokens is missing: objective.name={self.name} needs the size of its blocks, such as "
                "16; set it"
            )
        if self.clip is not None and self.clip.enforce == "counts" and kind != "block":
            errors.append("objective.clip.enforce=counts is for objective.name=block; remove either")
        if kind == "autoregressive" and not self.shift:
            errors.append(f"objective.shift=false is impossible with objective.name={self.name}; remove it")
        return errors

    def _errors_of_draws(self) -> list[str]:
        """Return the errors between the keys that decide when and what is masked."""
        errors = []
        if self.mask_sampler == "count":
            for key in ("schedule", "num_timesteps", "clip", "weight", "complementary"):
                if self._is_set(key):
                    errors.append(
                        f"objective.{key}={_shown(getattr(self, key))} cannot be combined with "
                        "objective.mask_sampler=count, which integrates over t; remove either"
                    )
        if self.num_timesteps is not None and (self.clip is not None or self.complementary):
            errors.append(
                "objective.num_timesteps is discrete time, which objective.clip and objective.complementary do not "
                "have; remove either"
            )
        if self.complementary and (self.draws_per_sequence % 2 or self.clip is not None or self.weight == "time"):
            errors.append(
                "objective.complementary=true needs an even objective.draws_per_sequence (it is "
                f"{self.draws_per_sequence}), no objective.clip and a weight other than `time`; change either"
            )
        return errors

    def _is_set(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].get_default())


_SPECIFIC_KEYS = tuple(key for key in Objective.model_fields if any(key in spec.keys for spec in OBJECTIVES.values()))


def _shown(value: object) -> str:
    return (
        str(value.model_dump(exclude_defaults=True))
        if isinstance(value, ConfigNode)
        else str(value).lower()
        if value is True
        else str(value)
    )
