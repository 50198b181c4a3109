"""The rules of sampling by their names."""

from __future__ import annotations

from typing import cast

from dlm_ray.config.errors import UserError
from dlm_ray.config.imports import import_class, is_class_path
from dlm_ray.config.sampling import ResolvedSampling
from dlm_ray.diffusion.denoiser import Objective
from dlm_ray.diffusion.objectives.genmd4 import GenMD4
from dlm_ray.diffusion.samplers.rules import (
    Ancestral,
    Confidence,
    EntropyBounded,
    Factor,
    FirstHitting,
    LeftToRight,
    Rule,
    SelectionRule,
    StateDependent,
    Threshold,
    Tweedie,
)
from dlm_ray.diffusion.schedules import Polynomial


def build_rule(params: ResolvedSampling, objective: Objective, vocab_size: int) -> Rule:
    """Return the rule that `params.rule` names.

    Args:
        params: the rule and its options.
        objective: the checkpoint's objective; the rule `state_dependent` is for `GenMD4`, whose exponents it uses.
        vocab_size: V of the network.
    """
    if is_class_path(params.rule):
        return load_rule(params.rule, needs_blocks=params.block_tokens is not None)
    if params.rule == "state_dependent":
        return StateDependent(cast(GenMD4, objective).exponents)
    rules: dict[str, Rule] = {
        "confidence": Confidence(Polynomial()),
        "margin": Confidence(Polynomial(), "margin"),
        "ancestral": Ancestral(Polynomial(), joint=params.noise == "float32_gumbel", remask=params.remask),
        "first_hitting": FirstHitting(),
        "threshold": Threshold(params.threshold),
        "factor": Factor(params.factor),
        "entropy_bounded": EntropyBounded(params.entropy_bound),
        "tweedie": Tweedie(Polynomial(), vocab_size),
        "left_to_right": LeftToRight(),
    }
    return rules[params.rule]


def load_rule(path: str, *, needs_blocks: bool) -> Rule:
    """Return an instance of a custom rule.

    Args:
        path: `package.module:Class`; the class has no required arguments.
        needs_blocks: whether the rule must be a `SelectionRule`, which blocks over a cache need.

    Raises:
        UserError: if there is no such class, it is not a rule, or it needs arguments.
    """
    rule_class = import_class(path, "rule", requires=("step", "is_timed", "remasks"))
    if needs_blocks and not issubclass(rule_class, SelectionRule):
        allowed = "sampling block by block needs a subclass of dlm_ray.diffusion.samplers.rules.SelectionRule"
        raise UserError.of("rule", path, allowed)
    try:
        rule: Rule = rule_class()
    except TypeError as error:
        raise UserError.of("rule", path, f"must be a class without required arguments ({error})") from error
    return rule
