"""Tokens from logits: temperature, nucleus, one uniform number a token, and how sure the model is. Float64 throughout.

Tokens are drawn by inverting the cumulative distribution in float64. That is the law of float64 Gumbel-max, without the truncated tails that
float32 Gumbel noise gives, which lower the entropy and flatter the text.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Ranking = Literal["probability", "margin", "entropy"]
"""Of a proposal, under the model at temperature 1: log p of the drawn token; p_1 - p_2 of the two most probable; -H of the distribution."""


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """[n, V] logits -> [n, V] float64 probabilities at this temperature within the nucleus, of a sum of 1; NaN where no token may be drawn.

    The row's maximum is subtracted before the division, so that no temperature, however small, overflows.
    """
    logits = logits.double()
    best = logits.amax(-1, keepdim=True)
    if temperature == 0:
        certain = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).double()
        return torch.where(best > float("-inf"), certain, float("nan"))
    probs = (logits if temperature == 1 else (logits - best) / temperature).softmax(-1)
    if top_p < 1:
        probs = nucleus(probs, top_p)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw_or_stay(becomes: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[n, V] probabilities of a sum of at most 1, [n] uniform numbers -> tokens [n], and whether one was drawn [n] (else: stays masked).

    A row of NaN has no token that may be drawn: its token is -1, and it does not stay.
    """
    cumulative = becomes.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding may leave a sum of 1 below it; then nothing stays.
    target = torch.where(total > 1 - 1e-9, uniform * total, uniform)
    tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    is_impossible = total.isnan()
    is_drawn = (tokens < becomes.shape[1]) | is_impossible
    return tokens.clamp(max=becomes.shape[1] - 1).masked_fill(is_impossible, -1), is_drawn


def draw_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, confidence: Ranking | None = "probability"
) -> tuple[Tensor, Tensor]:
    """One token a row of logits, and the model's confidence in it.

    Args:
        logits: [n, V]; -inf for what may not be drawn.
        uniform: [n] float64 in [0, 1).
        temperature: divides the logits; 0 takes the most probable token.
        top_p: keeps the smallest set of tokens with at least this probability (nucleus).
        confidence: which; None computes none.

    Returns:
        tokens [n] int64, -1 where no token may be drawn; and the confidence [n] float64 at temperature 1, 0 if none is asked for.
    """
    model = None  # the probabilities at temperature 1, made at most once
    if temperature == 0:
        best, tokens = logits.max(-1)
        tokens = torch.where(best > float("-inf"), tokens, -1)  # NaN is not above it
    else:
        probs = probabilities(logits, temperature, top_p)
        tokens = draw_or_stay(probs, uniform)[0]
        if temperature == 1 and top_p == 1:
            model = probs
    if confidence is None:
        return tokens, torch.zeros_like(uniform)
    return tokens, confidence_in(tokens, probabilities(logits, 1.0, 1.0) if model is None else model, confidence)


def confidence_in(tokens: Tensor, probs: Tensor, ranking: Ranking) -> Tensor:
    """[n] float64: how sure a model of these probabilities [n, V] is of tokens [n], the higher the surer; finite, so that none ranks below nothing."""
    if ranking == "probability":
        smallest = torch.finfo(probs.dtype).tiny
        return probs.gather(1, tokens.clamp(min=0)[:, None])[:, 0].clamp(min=smallest).log()
    if ranking == "margin":
        best_two = probs.topk(2, -1).values
        return best_two[:, 0] - best_two[:, 1]
    return torch.special.xlogy(probs, probs).sum(-1)


def log_probability(tokens: Tensor, logits: Tensor) -> Tensor:
    """[n] float64: the model's log-probability of tokens [n] at temperature 1, for people to see, whatever a rule ranks by."""
    return confidence_in(tokens, probabilities(logits, 1.0, 1.0), "probability")


def nothing_allowed(position: int | None) -> str:
    """What is wrong where `draw_tokens` drew -1; a position is named where something adjusts the logits."""
    if position is None:
        return "no token can be drawn: the network's logits are not finite; check the weights"
    return f"adjust allows no token at position {position}: every logit is -inf; leave at least one (or the network's logits are not finite)"


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """[n, V] -> the smallest set of largest probabilities that reaches top_p, the rest 0 (not normalised)."""
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # the mass of the tokens in front; the first token is always kept
    return torch.zeros_like(probs).scatter(-1, order, torch.where(before < top_p, ordered, 0.0))
