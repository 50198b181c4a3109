"""The options of a sampling call, and their resolution against a checkpoint, which reports all errors at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from dlm_ray.config.errors import UserError
from dlm_ray.config.imports import is_class_path
from dlm_ray.config.sampling import RULE_OF, LocalSampling, ResolvedSampling, Sampling, option_errors
from dlm_ray.diffusion.samplers.adjust import Adjust
from dlm_ray.diffusion.samplers.rules import Canvas
from dlm_ray.diffusion.samplers.simplex import Control
from dlm_ray.generation.progress import TextProgress
from dlm_ray.generation.rules import load_rule

# Rules that sample a token and whether it is revealed together; they need the whole text.
WHOLE_CANVAS_RULES = ("state_dependent", "tweedie")
_BLOCKS_ONLY = ("stop", "candidates", "reward")
OnStep = Callable[[int, int, Canvas], None]
TextCallback = Callable[[TextProgress], None]


class SamplingOptions(TypedDict, total=False):
    """Options of a Python call; an option that is left out, or None, has the value of the checkpoint's recipe.

    `config.sampling.LocalSampling` defines range, default and meaning of the options up to `reward_temperature`.
    """

    rule: str | None
    steps: int | None
    grid: Literal["uniform", "cosine"] | None
    temperature: float | None
    top_p: float | None
    threshold: float | None
    factor: float | None
    entropy_bound: float | None
    remask: float | None
    block_tokens: int | None
    noise: Literal["float64", "float32_gumbel"] | None
    num_samples: int | None
    stop: Sequence[str] | None
    candidates: int | None
    reward_temperature: float | None
    ban: Sequence[str]
    """Texts of one token each that are never sampled."""
    force: Mapping[int, str]
    """Texts at fixed positions: the key counts tokens after the prompt, from 0."""
    adjust: Adjust | None
    """(logits [n, V], rows [n], positions [n]) -> logits. Positions count from the start token: the first after a
    prompt of n tokens is 1 + n."""
    reward: Callable[[str], float] | None
    """Reward of a text so far, including its prompt; it chooses between `candidates`."""
    control: Control | None
    """For ssd_lm: log f(y | text) [B] of token probabilities [B, K, V]; its gradient steers the text (paper, 3.3)."""
    control_weight: float
    """Weight of the gradient of `control`."""
    seed: int
    """Seed of the random numbers: the same seed gives the same text, whatever else is in the batch."""
    on_step: OnStep | None
    """Called with (steps done, steps, canvas); with blocks, (blocks done, blocks, canvas of the blocks in progress)."""
    on_text: TextCallback | None
    """Called after each step with the first text of the batch so far, also across blocks. Not for ssd_lm."""


@dataclass(frozen=True)
class SamplingTarget:
    """The properties of a checkpoint that decide how it is sampled."""

    kind: Literal["autoregressive", "block", "whole", "simplex"]
    rules: tuple[str, ...]
    """Built-in rules of the checkpoint, the default first."""
    sampling: Sampling
    """The section of the recipe."""
    sequence_length: int
    """Context length in tokens."""
    block_tokens: int | None
    """Block size in training; None without blocks."""


def resolve_sampling(options: SamplingOptions, target: SamplingTarget, length: int) -> ResolvedSampling:
    """Return the options of a call, with the recipe's values where the call sets none.

    Args:
        options: as the caller passed them.
        target: the checkpoint.
        length: tokens to generate.

    Raises:
        UserError: that names all errors; `field` is the first of them.
    """
    recipe = target.sampling
    params = {name: value for name, value in options.items() if value is not None}
    errors = option_errors({name: value for name, value in params.items() if name in LocalSampling.model_fields})
    if any(error.field == "block_tokens" for error in errors):
        raise _joined(errors)
    block_tokens = _block_tokens(options.get("block_tokens"), target)
    rules = tuple(rule for rule in target.rules if block_tokens is None or rule not in WHOLE_CANVAS_RULES)
    rule = _rule(options.get("rule"), target, rules)
    errors += _rule_errors(rule, target, rules, block_tokens)
    errors += [
        UserError.of(name, params[name], f"belongs to rule={owner}, and the rule is {rule}", "change either")
        for name, owner in RULE_OF.items()
        if name in params and rule != owner
    ]
    errors += _misplaced_options(params, options.get("candidates") or 1, target, block_tokens)
    if errors:
        raise _joined(errors)
    steps = options.get("steps")
    if steps is None:
        is_trained_size = (block_tokens is not None) == (target.kind == "block")
        steps = (recipe.steps if is_trained_size else None) or min(64, length if block_tokens is None else block_tokens)
    values: dict[str, object] = {name: getattr(recipe, name) for name in Sampling.model_fields}
    values |= {name: value for name, value in params.items() if name in LocalSampling.model_fields}
    values |= {
        "rule": rule,
        "steps": length if target.kind == "autoregressive" else steps,
        "block_tokens": block_tokens,
    }
    return ResolvedSampling.model_validate(values)


def _joined(errors: Sequence[UserError]) -> UserError:
    """Return one error with the messages of all and the field of the first."""
    joined = UserError("; ".join(map(str, errors)))
    joined.field, joined.value, joined.allowed = errors[0].field, errors[0].value, errors[0].allowed
    return joined


def _rule(name: str | None, target: SamplingTarget, rules: tuple[str, ...]) -> str:
    """Return the rule that was passed, else the recipe's if it is possible here, else the default."""
    if name is not None:
        return name
    recipe_rule = target.sampling.rule
    is_possible = recipe_rule is not None and (recipe_rule in rules or is_class_path(recipe_rule))
    return recipe_rule if recipe_rule is not None and is_possible else rules[0]


def _rule_errors(
    rule: str, target: SamplingTarget, rules: tuple[str, ...], block_tokens: int | None
) -> list[UserError]:
    """Return an error if the checkpoint is not sampled by the rule."""
    if rule in rules:
        return []
    if is_class_path(rule) and target.kind in ("block", "whole"):
        try:
            load_rule(rule, needs_blocks=block_tokens is not None)
        except UserError as error:
            error.field, error.value = "rule", rule
            return [error]
        return []
    allowed = f"does not belong to the checkpoint's objective; must be one of {', '.join(rules)}"
    return [UserError.of("rule", rule, allowed)]


def _block_tokens(size: int | None, target: SamplingTarget) -> int | None:
    """Return the block size, None for the whole canvas; warn of a size that differs from the one in training.

    Raises:
        UserError: if the checkpoint cannot be sampled in blocks of this size.
    """
    trained, sequence_length = target.block_tokens, target.sequence_length
    if size is None or size == trained:
        return trained
    if target.kind in ("autoregressive", "simplex"):
        kind = (
            "autoregressive, which is blocks of 1 token"
            if trained == 1
            else "an SSD-LM, whose blocks are as long as in training"
        )
        raise UserError.of("block_tokens", size, f"this checkpoint is {kind}", "leave it out")
    if sequence_length % size:
        allowed = f"blocks have to fill the context of {sequence_length} tokens, so allowed are its divisors"
        raise UserError.of("block_tokens", size, allowed, "change `block_tokens`")
    sampled = None if size == sequence_length else size
    if sampled != trained:
        in_training, here = (
            f"whole sequences of {sequence_length} tokens" if blocks is None else f"blocks of {blocks} tokens"
            for blocks in (trained, sampled)
        )
        warnings.warn(
            f"the checkpoint was trained on {in_training} and is sampled by {here}, which it was not trained for",
            stacklevel=2,
        )
    return sampled


def _misplaced_options(
    params: Mapping[str, object], num_candidates: int, target: SamplingTarget, block_tokens: int | None
) -> list[UserError]:
    """Return an error for each option that the checkpoint's sampler does not have."""
    errors = []
    if "control" in params and target.kind != "simplex":
        errors.append(_error("control", "`control` steers ssd_lm checkpoints only"))
    if target.kind == "simplex":
        for name in ("force", "adjust"):
            if params.get(name):
                errors.append(_error(name, f"`{name}` is not for ssd_lm checkpoints; steer them with `control`"))
    if block_tokens is None:
        for name in _BLOCKS_ONLY:
            if params.get(name) and params[name] != 1:
                message = f"`{name}` is for sampling block by block, and this samples the whole canvas at once"
                errors.append(_error(name, f"{message}; add `block_tokens`"))
    elif params.get("noise", "float64") != "float64":
        allowed = f"is for the whole canvas, and this samples blocks of {block_tokens}"
        errors.append(UserError.of("noise", params["noise"], allowed, "leave it out"))
    if (num_candidates > 1) != ("reward" in params):
        message = (
            "`candidates` and `reward` go together: the number of candidates per block, and the choice between them"
        )
        errors.append(_error("candidates", message))
    return errors


def _error(field: str, message: str) -> UserError:
    """Return an error about an option whose value does not matter."""
    error = UserError(message)
    error.field = field
    return error
