"""Samples tokens from logits with temperature, nucleus and one uniform number per token, and computes confidence.

Tokens are sampled in float64 by inverting the cumulative distribution. The distribution is that of float64 Gumbel-max,
without the truncated tails of float32 Gumbel noise, which lower the entropy and make generated text look better than it
is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Ranking = Literal["probability", "margin", "entropy"]
"""The confidence of a proposal under the model at temperature 1: log p of the sampled token, p_1 - p_2 of the two most
probable tokens, or -H of the distribution."""


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the float64 probabilities [n, V] of logits [n, V] at this temperature, within the nucleus.

    Each row sums to 1; it is NaN if no token is allowed. The maximum of the row is subtracted before the division, so
    that even a very small temperature does not overflow.
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


def sample_or_stay(becomes: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a token, or the outcome that the position stays masked, from probabilities [n, V] that sum to at most 1.

    Returns the tokens [n] and whether one was sampled [n]. A row of NaN allows no token: its token is -1, and it counts
    as sampled.
    """
    cumulative = becomes.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding may leave a sum of 1 slightly below 1; then no position stays masked.
    target = torch.where(total > 1 - 1e-9, uniform * total, uniform)
    tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    is_impossible = total.isnan()
    is_sampled = (tokens < becomes.shape[1]) | is_impossible
    return tokens.clamp(max=becomes.shape[1] - 1).masked_fill(is_impossible, -1), is_sampled


def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, confidence: Ranking | None = "probability"
) -> tuple[Tensor, Tensor]:
    """Sample one token per row of logits, and compute the model's confidence in it.

    Args:
        logits: [n, V]; -inf for tokens that are not allowed.
        uniform: [n] float64 in [0, 1).
        temperature: divides the logits; 0 takes the most probable token.
        top_p: keeps the smallest set of tokens with at least this probability (nucleus).
        confidence: the kind of confidence; None computes none.

    Returns:
        tokens [n] int64, -1 where no token is allowed; and the confidence [n] float64 at temperature 1, 0 if
        `confidence` is None.
    """
    model = None  # the probabilities at temperature 1, computed at most once
    if temperature == 0:
        best, tokens = logits.max(-1)
        tokens = torch.where(best > float("-inf"), tokens, -1)  # a NaN is not greater than -inf
    else:
        probs = probabilities(logits, temperature, top_p)
        tokens = sample_or_stay(probs, uniform)[0]
        if temperature == 1 and top_p == 1:
            model = probs
    if confidence is None:
        return tokens, torch.zeros_like(uniform)
    return tokens, confidence_in(tokens, probabilities(logits, 1.0, 1.0) if model is None else model, confidence)


def confidence_in(tokens: Tensor, probs: Tensor, ranking: Ranking) -> Tensor:
    """Return the confidence [n] float64 of a model with probabilities [n, V] in tokens [n].

    A higher value means more confidence. Values are finite, so that every proposal ranks above positions
    without one (-inf).
    """
    if ranking == "probability":
        smallest = torch.finfo(probs.dtype).tiny
        return probs.gather(1, tokens.clamp(min=0)[:, None])[:, 0].clamp(min=smallest).log()
    if ranking == "margin":
        best_two = probs.topk(2, -1).values
        return best_two[:, 0] - best_two[:, 1]
    negative_entropy: Tensor = torch.special.xlogy(probs, probs).sum(-1)
    return negative_entropy


def log_probability(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the model's log-probability [n] float64 of tokens [n] at temperature 1, for display."""
    return confidence_in(tokens, probabilities(logits, 1.0, 1.0), "probability")


def nothing_allowed(position: int | None) -> str:
    """Return the error message for a token of -1 from `sample_tokens`; pass the position if an `adjust` is in use."""
    if position is None:
        return "no token can be sampled: the network's logits are not finite; check the weights"
    return (
        f"adjust allows no token at position {position}: every logit is -inf; leave at least one "
        "(or the network's logits are not finite)"
    )


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of largest probabilities of each row [n, V] that reaches top_p; set the rest to 0."""
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # the mass of more probable tokens; the first token is always kept
    return torch.zeros_like(probs).scatter(-1, order, torch.where(before < top_p, ordered, 0.0))
