"""The recipe's `objective` and `sampling`: which paper's loss, its noise, its draws, and the sampler that belongs to it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from dlm_ray.config.parts import ConfigNode, Fraction, Positive

_MASKED = {"masked", "block", "d3pm", "tauldr", "sedd"}  # whose masks are Bernoulli by a schedule
# Which objectives use a key; with any other, setting it is a mistake.
_USED_BY: dict[str, set[str]] = {
    "schedule": _MASKED,
    "num_timesteps": {"masked", "d3pm"},
    "times": {*_MASKED, "genmd4", "ssd_lm"},
    "mask_sampler": {"masked", "block", "sedd"},
    "draws_per_sequence": _MASKED,
    "clip": {"masked", "block", "sedd"},
    "weight": {"masked", "block"},
    "complementary": {"masked", "block", "sedd"},
    "context_weights": {"masked"},
    "confidence_weight": {"masked", "block"},
    "autoregressive_weight": {"masked", "block"},
    "alignment_weight": {"masked"},
    "normalize_by": {"masked", "block", "sedd"},  # what d3pm and tauldr score is not what is masked
    "exponents": {"genmd4"},
    "estimator": {"tauldr"},
    "posterior_epsilon": {"d3pm"},
    "simplex": {"ssd_lm"},
    "block_tokens": {"block"},
    "context": {"block"},
}
# What a class of somebody's own is not given: it is called as `Masked` is.
_OF_ONE_CLASS = ("exponents", "estimator", "posterior_epsilon", "simplex", "block_tokens", "context")
NAMES = ("autoregressive", "masked", "block", "genmd4", "sedd", "d3pm", "tauldr", "ssd_lm")
# The rules that sample from a model of each objective, the default first.
_ADAPTIVE = ("margin", "threshold", "factor", "entropy_bounded")
_WHOLE = ("confidence", "ancestral", "first_hitting", *_ADAPTIVE)
RULES: dict[str, tuple[str, ...]] = {
    "autoregressive": ("left_to_right",),
    "masked": _WHOLE,
    "block": ("confidence", "first_hitting", "ancestral", *_ADAPTIVE),
    "genmd4": ("state_dependent", "confidence", *_ADAPTIVE),
    "sedd": ("tweedie", *_WHOLE),
    "d3pm": _WHOLE,
    "tauldr": _WHOLE,
    "ssd_lm": ("sampled", "greedy", "multi_hot"),
}


def rules_of(objective: str) -> tuple[str, ...]:
    """The sampling rules that belong to an objective, the default first; of somebody's own, those of `masked`."""
    return RULES.get(objective, _WHOLE)


class Schedule(ConfigNode):
    """alpha(t): the probability that a token is still clean at time t."""

    name: Literal["linear", "polynomial", "cosine", "cosine_alpha", "geometric", "log", "square", "square_root"] = (
        "linear"
    )
    """`cosine` is MD4's, 1 - cos(pi/2 (1 - t)); `cosine_alpha` BD3-LM's, cos(pi/2 t)."""
    exponent: Annotated[float, Field(gt=0.0)] | None = None
    """Of `polynomial`: alpha(t) = 1 - t ** exponent."""
    epsilon_0: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """alpha(0) = 1 - epsilon_0 (MD4's code: 1e-4). Reported bounds do not depend on it: they are over the full
    range."""
    epsilon_1: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """alpha(1) = epsilon_1 (MD4's code: 1e-4; SEDD: 1e-3)."""


class Clip(ConfigNode):
    """Training draws t from [beta, omega] alone (BD3-LM); with the linear schedule that is the mask probability."""

    beta: float
    omega: float
    weight: Literal["unbiased", "paper"] = "unbiased"
    """`unbiased`: the ELBO's integral over the interval; `paper`: BD3-LM's code, without the constant omega - beta,
    flat if beta > 0.5."""
    enforce: Literal["none", "counts"] = "none"
    """`counts`: the masked share of every block is within [beta, omega], too, as in BD3-LM's code; drawn at once,
    without its rejection loop."""

    def fits(self, block_tokens: int) -> bool:
        """Whether a whole number of masked tokens of a block of so many lies within the interval."""
        least = 0 if self.beta <= 1e-3 else math.ceil(self.beta * block_tokens - 1e-9)
        return least <= math.floor(self.omega * block_tokens + 1e-9)


class Simplex(ConfigNode):
    """SSD-LM's noise."""

    block_tokens: Positive = 25
    scale: Annotated[float, Field(gt=0.0)] = 5.0
    """K: a token is +K at its own logit and -K at all others."""
    num_timesteps: Positive = 5000


class Objective(ConfigNode):
    """What is minimised."""

    name: str = "masked"
    """`autoregressive`, `masked` (MD4, MDLM, DiffuLLaMA), `block` (BD3-LM), `genmd4`, `sedd`, `d3pm`, `tauldr`,
    `ssd_lm`, or `package.module:Class`."""
    schedule: Schedule = Schedule()
    num_timesteps: Positive | None = None
    """T of discrete time; continuous if absent. `d3pm`: 1000 if absent. Reported bounds are in continuous time."""
    times: Literal["stratified", "antithetic", "independent", "paper"] = "stratified"
    """How the t of a global batch hang together: `paper` is the order of BD3-LM's code, which is biased by the place in
    the batch."""
    mask_sampler: Literal["bernoulli", "count"] = "bernoulli"
    """`count`: k uniform in 1..N, a uniform subset of k of N tokens, weight N/k: unbiased, and never nothing masked."""
    draws_per_sequence: Positive = 1
    """So many draws of every row in a batch; training.micro_batch_size counts them, too."""
    clip: Clip | None = None
    weight: Literal["elbo", "flat", "time"] = "elbo"
    """DiffuLLaMA's 1/t, 1 and t. Reported bounds always have the ELBO's."""
    complementary: bool = False
    """Pairs of draws that mask what the other leaves clean; draws_per_sequence has to be even."""
    context_weights: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """p of Dream's context-adaptive weights (0.3)."""
    confidence_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """CAP: times the entropy at masked tokens that are already predicted right."""
    autoregressive_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Times the next-token loss of the same network on the clean row, by a second pass with causal attention."""
    alignment_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Times 1 - cosine between the states and those of the frozen AR model.base (REPR-ALIGN: 10)."""
    shift: bool = True
    """Position i is predicted by row i-1, as in the AR model that was the base (DiffuLLaMA)."""
    normalize_by: Literal["all_tokens", "global_masked"] = "all_tokens"
    """What the sum over masked tokens is divided by; the AR and alignment terms are means over all tokens either way."""
    exponents: Literal["per_token", "scalar"] = "per_token"
    """GenMD4's learned w: one a token, or one for all (the ablation)."""
    estimator: Literal["one_token", "all_masked"] = "one_token"
    """tauLDR's."""
    posterior_epsilon: Annotated[float, Field(gt=0.0)] = 1e-6
    """D3PM's, inside the logarithms of its posteriors."""
    simplex: Simplex | None = None
    block_tokens: Positive | None = None
    """K of `block`: 1 is the autoregressive end, the length of a row masked diffusion."""
    context: Literal["clean", "noisy"] = "clean"
    """What a block sees of those before it; `noisy` trains on x_t alone (BD3-LM's ablation)."""

    @property
    def draws_of_a_row(self) -> int:
        """Draws of a row in a batch: GenMD4's masks come in pairs."""
        return 2 if self.name == "genmd4" else self.draws_per_sequence

    def contradictions(self, has_base: bool) -> list[str]:
        """Mistakes between the keys of `objective`."""
        found = []
        for key in _USED_BY if self.name in NAMES else _OF_ONE_CLASS:
            value, users = getattr(self, key), _USED_BY[key]
            if self.name not in users and value != type(self).model_fields[key].get_default():
                found.append(
                    f"objective.{key}={_shown(value)} is not used by objective.name={self.name}, only by {', '.join(sorted(users))}; remove it"
                )
        schedule = self.schedule
        if (schedule.name == "polynomial") != (schedule.exponent is not None):
            found.append(
                f"objective.schedule.exponent={schedule.exponent} goes with objective.schedule.name=polynomial and with no other, "
                f"and the name is {schedule.name}; set both or neither"
            )
        clip = self.clip
        if clip is not None and not 0 <= clip.beta < clip.omega <= 1:
            found.append(
                f"objective.clip: beta={clip.beta}, omega={clip.omega}; allowed is 0 <= beta < omega <= 1, an interval of t within (0, 1)"
            )
        if self.name == "block" and self.block_tokens is None:
            found.append(
                "objective.block_tokens is missing: objective.name=block needs the size of its blocks, such as 16; set it"
            )
        if clip is not None and clip.enforce == "counts" and self.name != "block":
            found.append("objective.clip.enforce=counts is for objective.name=block; remove either")
        if self.name == "autoregressive" and not self.shift:
            found.append("objective.shift=false is impossible with objective.name=autoregressive; remove it")
        if self.mask_sampler == "count":
            for key in ("schedule", "num_timesteps", "clip", "weight", "complementary"):
                if getattr(self, key) != type(self).model_fields[key].get_default():
                    found.append(
                        f"objective.{key}={_shown(getattr(self, key))} cannot be combined with objective.mask_sampler=count, which integrates "
                        "over t; remove either"
                    )
        if self.num_timesteps is not None and (self.clip is not None or self.complementary):
            found.append(
                "objective.num_timesteps is discrete time, which objective.clip and objective.complementary do not have; remove either"
            )
        if self.complementary and (self.draws_per_sequence % 2 or self.clip is not None or self.weight == "time"):
            found.append(
                f"objective.complementary=true needs an even objective.draws_per_sequence (it is {self.draws_per_sequence}), no objective.clip and a weight "
                "other than `time`; change either"
            )
        if self.autoregressive_weight and not self.shift:
            found.append(
                "objective.autoregressive_weight needs objective.shift=true, as in an autoregressive model; change either"
            )
        if self.alignment_weight and not has_base:
            found.append(
                "objective.alignment_weight needs model.base, the frozen autoregressive model to align with; set it or remove the first"
            )
        return found


class Sampling(ConfigNode):
    """How `dlm-ray sample` writes from this run's checkpoints where its command line does not say otherwise."""

    rule: str | None = None
    """One that belongs to the objective; its usual one if absent."""
    steps: Positive | None = None
    """T; of block and ssd_lm a block's. 64 or the length, whichever is less, if absent; of block as many as a block has
    tokens."""
    grid: Literal["uniform", "cosine"] = "uniform"
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[Fraction, Field(gt=0.0)] = 1.0
    threshold: Fraction = 0.9
    """Of rule `threshold`: proposals of a higher probability are revealed (Fast-dLLM's default, arXiv 2505.22618)."""
    factor: Annotated[float, Field(gt=0.0)] = 1.0
    """Of rule `factor`: f in (n + 1)(1 - p) < f; 1 is what Fast-dLLM's theorem 1 covers."""
    entropy_bound: Annotated[float, Field(ge=0.0)] = 0.1
    """Of rule `entropy_bounded`: gamma in nats (EB-Sampler, arXiv 2505.24857; 0.1 is what DiffusionGemma is served
    with)."""
    remask: Fraction = 0.0
    """Of rule `ancestral`: eta, the highest probability of masking a written token again in a step (ReMDM-cap, arXiv
    2503.00307)."""

    def contradictions(self, objective: str) -> list[str]:
        """A rule that does not belong to the objective."""
        allowed = rules_of(objective)
        if self.rule is None or self.rule in allowed:
            return []
        return [
            f"sampling.rule={self.rule} does not belong to objective.name={objective}; allowed are {', '.join(allowed)}"
        ]


def _shown(value: Any) -> str:
    return (
        str(value.model_dump(exclude_defaults=True))
        if isinstance(value, ConfigNode)
        else str(value).lower()
        if value is True
        else str(value)
    )
