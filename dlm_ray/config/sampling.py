"""The options of sampling: the one place where their names, ranges, defaults and meanings are defined.

The recipe section `sampling` (`Sampling`), the fields of an HTTP request (`ServedSampling`), and the Python arguments
and command-line options (`LocalSampling`) are these models; `generation.sampling` resolves them to `ResolvedSampling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from dlm_ray.config.errors import UserError
from dlm_ray.config.imports import is_class_path
from dlm_ray.config.objective import OBJECTIVES, rules_of
from dlm_ray.config.parts import ConfigNode, Fraction

RULE_NAMES = tuple(dict.fromkeys(rule for spec in OBJECTIVES.values() for rule in spec.rules))
"""The built-in rules of all objectives."""
_MAX_COUNT = 2**20


@dataclass(frozen=True)
class OfRule:
    """Metadata of an option that belongs to one rule only."""

    name: str


class Sampling(ConfigNode):
    """How text is sampled from this run's checkpoints, where the caller does not set an option."""

    rule: str | None = None
    """Which tokens a step reveals: a rule of the objective, or `package.module:Class` for a custom rule (a class
    without required arguments). Default: the first rule of the objective."""
    steps: Annotated[int, Field(ge=1, le=_MAX_COUNT)] | None = None
    """Denoising steps T; per block for objectives block and ssd_lm and when block_tokens is set. Default: 64, or the
    number of tokens (of the text, or of a block) if that is less. Rules without times ignore it."""
    grid: Literal["uniform", "cosine"] = "uniform"
    """Times of the steps: uniform, or cosine, which reveals few tokens at first."""
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Temperature of the token probabilities; 0 takes the most probable token."""
    top_p: Annotated[Fraction, Field(gt=0.0)] = 1.0
    """Nucleus sampling: tokens are sampled from the smallest set with at least this probability."""
    threshold: Annotated[Fraction, OfRule("threshold")] = 0.9
    """With rule=threshold: a step reveals every proposal whose probability at temperature 1 is higher, and at least
    the most probable one (Fast-dLLM's default, arXiv 2505.22618)."""
    factor: Annotated[float, Field(gt=0.0), OfRule("factor")] = 1.0
    """f: a step reveals the n most probable proposals while (n + 1)(1 - p) < f; Fast-dLLM's theorem 1 covers 1."""
    entropy_bound: Annotated[float, Field(ge=0.0), OfRule("entropy_bounded")] = 0.1
    """gamma in nats: a step reveals proposals while their entropies, without the largest, sum to at most this
    (EB-Sampler, arXiv 2505.24857; DiffusionGemma is served with 0.1)."""
    remask: Annotated[Fraction, OfRule("ancestral")] = 0.0
    """eta: the highest probability of masking a revealed token again in a step (ReMDM-cap, arXiv 2503.00307)."""

    def contradictions(self, objective: str) -> list[str]:
        """Return an error message if the rule does not belong to the objective.

        Args:
            objective: `objective.name` of the recipe, or the `kind` of a custom objective.
        """
        allowed = rules_of(objective)
        if self.rule is None or self.rule in allowed:
            return []
        if is_class_path(self.rule) and (
            objective not in OBJECTIVES or OBJECTIVES[objective].canvas in ("block", "whole")
        ):
            return []
        return [
            f"sampling.rule={self.rule} does not belong to objective.name={objective}; allowed are {', '.join(allowed)}"
        ]


class ServedSampling(Sampling):
    """The options of an HTTP request: those of a recipe, and the block size, which in a recipe is the objective's."""

    block_tokens: Annotated[int, Field(ge=1, le=_MAX_COUNT)] | None = None
    """K: sample block by block over a KV cache. Default: as the checkpoint was trained. Other sizes warn; the whole
    training length samples the whole text at once."""


class LocalSampling(ServedSampling):
    """The options of Python and the command line: those of a request, and those that need the process of the caller."""

    noise: Literal["float64", "float32_gumbel"] = "float64"
    """Arithmetic of the random numbers: float64, or float32_gumbel, which truncates the tails as MD4's code does, for
    comparisons with it; it samples whole texts only."""
    num_samples: Annotated[int, Field(ge=1, le=_MAX_COUNT)] = 1
    """Texts in one batch."""
    stop: tuple[Literal["end", "entropy"], ...] = ()
    """When a text that is sampled block by block ends early: end, at an end-of-text token; entropy, when the unigram
    entropy of the last 256 tokens is below 4 nats, which drops those tokens (BD3-LM)."""
    candidates: Annotated[int, Field(ge=1, le=_MAX_COUNT)] = 1
    """Candidates of each block, of which `reward` keeps one with probability softmax(reward / reward_temperature)."""
    reward_temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Temperature of the choice between candidates; 0 keeps the best."""


class ResolvedSampling(LocalSampling):
    """The options of one call: validated, with every default filled in."""

    rule: str = "confidence"
    """Which tokens a step reveals: a rule of the checkpoint, or `package.module:Class`."""
    steps: Annotated[int, Field(ge=1)] = 64
    """Denoising steps, per block where there are blocks; the number of tokens for an autoregressive checkpoint."""
    block_tokens: int | None = None
    """K; None samples the whole text at once."""


PYTHON_ONLY = ("candidates", "reward_temperature")
"""Options that mean nothing without the Python callable `reward`."""
RULE_OF = {
    name: marker.name
    for name, info in Sampling.model_fields.items()
    for marker in info.metadata
    if isinstance(marker, OfRule)
}
"""Option -> the rule that it belongs to."""


def allowed_values(name: str) -> str:
    """Return what is allowed for an option, as a clause such as "must be more than 0 and at most 1"."""
    info = LocalSampling.model_fields[name]
    choices = [choice for part in _parts(info.annotation) if get_origin(part) is Literal for choice in get_args(part)]
    if choices:
        return f"must be one of {', '.join(choices)}"
    if str in _parts(info.annotation):
        return "must be the name of a rule, or package.module:Class for a custom rule"
    number = "a whole number" if int in _parts(info.annotation) else "a finite number"
    bounds = _bounds(info)
    clauses = []
    if "gt" in bounds:
        clauses.append(f"more than {bounds['gt']:g}")
    elif "ge" in bounds:
        clauses.append(f"at least {bounds['ge']:g}")
    if "le" in bounds:
        clauses.append(f"at most {bounds['le']:.7g}")
    limits = " and ".join(clauses)
    return f"must be {number}" + (f", {limits}" if limits else "")


def option_errors(values: Mapping[str, object]) -> list[UserError]:
    """Return an error for each value that is not in its option's range; all names are fields of `LocalSampling`."""
    try:
        LocalSampling.model_validate(values)
    except ValidationError as error:
        places = [(str(finding["loc"][0]), finding["input"]) for finding in error.errors()]
        return [UserError.of(name, value, allowed_values(name)) for name, value in dict(places).items()]
    return []


def _parts(annotation: object) -> tuple[object, ...]:
    """Return the members of a union or a tuple, without their metadata; a Literal is one member."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _parts(get_args(annotation)[0])
    if origin in (Union, UnionType, tuple):
        return tuple(part for member in get_args(annotation) for part in _parts(member))
    return (annotation,)


def _bounds(info: FieldInfo) -> dict[str, float]:
    """Return the bounds gt, ge and le of a field, whether its type is optional or not."""
    metadata = list(info.metadata)
    for member in get_args(info.annotation):
        for data in getattr(member, "__metadata__", ()):
            metadata += data.metadata if isinstance(data, FieldInfo) else [data]
    kinds = ("gt", "ge", "le")
    return {kind: getattr(data, kind) for data in metadata for kind in kinds if hasattr(data, kind)}
