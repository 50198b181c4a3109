"""How text is sampled: what may be asked for, the recipe's values where nothing was said, and every mistake at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from dlm_ray.config.errors import UserError
from dlm_ray.config.objective import Sampling
from dlm_ray.diffusion.samplers.adjust import Adjust
from dlm_ray.diffusion.samplers.rules import Canvas
from dlm_ray.diffusion.samplers.simplex import Control

GRIDS = ("uniform", "cosine")
NOISES = ("float64", "float32_gumbel")
STOPS = ("end", "entropy")
# Rules that draw token and coin at once serve the whole canvas alone.
WHOLE_CANVAS_RULES = ("state_dependent", "tweedie")
# The rule that an option belongs to.
_RULE_OF = {"threshold": "threshold", "factor": "factor", "entropy_bound": "entropy_bounded", "remask": "ancestral"}
_BLOCKS_ONLY = ("stop", "candidates", "reward")
OnStep = Callable[[int, int, Canvas], None]


class SamplingOptions(TypedDict, total=False):
    """How text is sampled; what is left out, or None, is as the checkpoint's recipe says."""

    num_samples: int
    """SamplingTarget in one batch; 1."""
    steps: int | None
    """Denoising steps, of a block where there are blocks. Rules without times and autoregressive models do not look at it."""
    rule: str | None
    """What a step reveals: one of `TextModel.rules`."""
    grid: str | None
    """Times of the steps: `uniform`, or `cosine`, which reveals little at first."""
    temperature: float | None
    """0 takes the most probable token."""
    top_p: float | None
    """Nucleus."""
    noise: str
    """`float64`, honest; `float32_gumbel` cuts the tails as MD4's code does, for comparisons with it; on the whole canvas alone."""
    block_tokens: int | None
    """K: block by block over a KV cache. As the checkpoint was trained; other sizes with a warning; the trained row is the whole canvas."""
    threshold: float | None
    """tau of `threshold`: probabilities above it are revealed."""
    factor: float | None
    """f of `factor`."""
    entropy_bound: float | None
    """gamma of `entropy_bounded`, in nats."""
    remask: float | None
    """eta of `ancestral`: the highest probability with which a written token is masked again in a step."""
    stop: Sequence[str]
    """Of blocks: `end`, at an end-of-text token; `entropy`, below 4 nats over the last 256 tokens, which are dropped (BD3-LM)."""
    ban: Sequence[str]
    """Texts of one token each that are never written."""
    force: Mapping[int, str]
    """Texts that stand at these tokens behind the prompt, counted from 0."""
    adjust: Adjust | None
    """(logits [n, V], rows [n], positions [n]) -> logits: positions count from the start token, so the first behind the prompt is 1 + its tokens."""
    candidates: int
    """Of blocks, with `reward`: so many of every block, of which one is kept with probability softmax(reward / reward_temperature)."""
    reward: Callable[[str], float] | None
    """Of the text so far, prompt included."""
    reward_temperature: float
    """1; 0 keeps the best."""
    control: Control | None
    """Of ssd_lm: log f(y | text) [B] of token probabilities [B, K, V], whose gradient steers the text (SSD-LM, section 3.3)."""
    control_weight: float
    seed: int
    """The same seed gives the same text, whatever else is in the batch."""
    on_step: OnStep | None
    """Called with (steps done, steps, canvas); of blocks with (blocks done, blocks, canvas of those in progress)."""


@dataclass(frozen=True)
class SamplingTarget:
    """What a checkpoint is, for its sampler."""

    kind: Literal["autoregressive", "block", "whole", "simplex"]
    rules: tuple[str, ...]
    sampling: Sampling
    sequence_length: int
    block_tokens: int | None
    """As trained; None without blocks."""


@dataclass(frozen=True)
class ResolvedSampling:
    """Options without mistakes."""

    num_samples: int
    steps: int
    rule: str
    grid: str
    temperature: float
    top_p: float
    noise: Any
    block_tokens: int | None
    """None: the whole canvas."""
    threshold: float
    factor: float
    entropy_bound: float
    remask: float


def resolve_sampling(options: SamplingOptions, checkpoint: SamplingTarget, length: int) -> ResolvedSampling:
    """The options with the recipe's where nothing was said.

    Raises:
        UserError: that names all mistakes.
    """
    own, asked = checkpoint.sampling, {name: value for name, value in options.items() if value is not None}
    block_tokens = _block_tokens(asked.get("block_tokens"), checkpoint)
    rules = tuple(rule for rule in checkpoint.rules if block_tokens is None or rule not in WHOLE_CANVAS_RULES)
    rule: Any = asked.get("rule") or (own.rule if own.rule in rules else rules[0])
    steps: Any = asked.get("steps")
    if steps is None:
        is_trained_size = (block_tokens is not None) == (checkpoint.kind == "block")
        steps = (own.steps if is_trained_size else None) or min(64, length if block_tokens is None else block_tokens)
    chosen: dict[str, Any] = {
        "num_samples": asked.get("num_samples", 1),
        "steps": length if checkpoint.kind == "autoregressive" else steps,
        "rule": rule,
        "noise": asked.get("noise", "float64"),
        "block_tokens": block_tokens,
    }
    for name in ("grid", "temperature", "top_p", *_RULE_OF):
        chosen[name] = asked.get(name, getattr(own, name))
    found = _out_of_range({**chosen, "steps": steps}, rules, asked)
    for name, belongs_to in _RULE_OF.items():
        if name in asked and rule != belongs_to:
            found.append(
                f"{_flag(name)} {asked[name]} belongs to --rule {belongs_to}, and the rule is {rule}; change either"
            )
    found += _out_of_place(asked, checkpoint, block_tokens)
    if found:
        raise UserError("; ".join(found))
    return ResolvedSampling(**chosen)


def _block_tokens(asked: Any, checkpoint: SamplingTarget) -> int | None:
    """The size of blocks, None for the whole canvas; warns of a size that was not trained."""
    trained, sequence_length = checkpoint.block_tokens, checkpoint.sequence_length
    if asked is None or asked == trained:
        return trained
    if checkpoint.kind in ("autoregressive", "simplex"):
        only = (
            "autoregressive, which is blocks of 1 token"
            if trained == 1
            else "an SSD-LM, whose blocks are as long as it was trained"
        )
        raise UserError(f"--block-tokens {asked}: this checkpoint is {only}; leave it out")
    if asked < 1 or sequence_length % asked:
        raise UserError(
            f"--block-tokens {asked}: blocks have to fill the context of {sequence_length} tokens, so allowed are its divisors; change --block-tokens"
        )
    now = None if asked == sequence_length else int(asked)
    if now != trained:
        was, here = (
            f"whole rows of {sequence_length} tokens" if size is None else f"blocks of {size} tokens"
            for size in (trained, now)
        )
        warnings.warn(
            f"the checkpoint was trained on {was} and is sampled by {here}, which it was not trained for", stacklevel=2
        )
    return now


def _out_of_range(chosen: dict[str, Any], rules: tuple[str, ...], asked: Mapping[str, Any]) -> list[str]:
    found = []
    for name in ("num_samples", "steps"):
        if chosen[name] < 1:
            found.append(f"{_flag(name)} {chosen[name]}: at least 1")
    if chosen["rule"] not in rules:
        found.append(
            f"--rule {chosen['rule']} does not belong to the checkpoint's objective; one of {', '.join(rules)}"
        )
    for name, allowed in (("grid", GRIDS), ("noise", NOISES)):
        if chosen[name] not in allowed:
            found.append(f"--{name} {chosen[name]}: one of {', '.join(allowed)}")
    for name in ("temperature", "entropy_bound"):
        if not 0 <= chosen[name] < math.inf:
            found.append(f"{_flag(name)} {chosen[name]}: 0 or more, and finite")
    if not 0 < chosen["top_p"] <= 1:
        found.append(f"--top-p {chosen['top_p']}: more than 0 and at most 1")
    for name in ("threshold", "remask"):
        if not 0 <= chosen[name] <= 1:
            found.append(f"--{name} {chosen[name]}: a probability, from 0 to 1")
    if not 0 < chosen["factor"] < math.inf:
        found.append(f"--factor {chosen['factor']}: more than 0, and finite")
    for stop in asked.get("stop", ()):
        if stop not in STOPS:
            found.append(f"--stop {stop}: one of {', '.join(STOPS)}")
    if asked.get("candidates", 1) < 1:
        found.append(f"candidates={asked['candidates']}: at least 1")
    if asked.get("reward_temperature", 1) < 0:
        found.append(f"reward_temperature={asked['reward_temperature']}: 0 or more")
    return found


def _out_of_place(asked: Mapping[str, Any], checkpoint: SamplingTarget, block_tokens: int | None) -> list[str]:
    """Options that the checkpoint's sampler has no use for."""
    found = []
    if "control" in asked and checkpoint.kind != "simplex":
        found.append("control steers ssd_lm checkpoints alone")
    if checkpoint.kind == "simplex":
        for name in ("force", "adjust"):
            if asked.get(name):
                found.append(f"{_flag(name)} is not for ssd_lm checkpoints; steer them with control")
    if block_tokens is None:
        for name in _BLOCKS_ONLY:
            if asked.get(name) and asked[name] != 1:
                found.append(
                    f"{_flag(name)} is for sampling block by block, and this is the whole canvas at once; add --block-tokens"
                )
    elif asked.get("noise", "float64") != "float64":
        found.append(
            f"--noise {asked['noise']} is for the whole canvas, and this is sampled by blocks of {block_tokens}; leave it out"
        )
    if (asked.get("candidates", 1) > 1) != ("reward" in asked):
        found.append("candidates and reward go together: so many of every block, and what decides between them")
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
