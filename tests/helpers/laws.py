"""Exact laws of finished texts of the toy denoiser, and the test that a sample follows one."""

import itertools
import math

import numpy as np
import torch

from dlm_ray.diffusion.samplers.rules import Canvas
from dlm_ray.diffusion.visibility import Visibility
from helpers.toy import LENGTH, MASK, VOCAB

FULL = Visibility("bidirectional")


def empty_canvas(num_rows):
    ids = torch.zeros(num_rows, 1 + LENGTH, dtype=torch.long)
    is_masked = torch.ones(num_rows, 1 + LENGTH, dtype=torch.bool)
    is_masked[:, 0] = False
    return Canvas(ids, is_masked)


def transition(denoiser, x_t, reveal_probability):
    """Exact distribution over next states of one ancestral step from x_t."""
    log_probs = denoiser.log_probs(torch.tensor(x_t))
    masked = [n for n in range(1, 1 + LENGTH) if x_t[n] == MASK]
    for revealed in itertools.product([False, True], repeat=len(masked)):
        chosen = [n for n, is_revealed in zip(masked, revealed, strict=True) if is_revealed]
        p_positions = math.prod(reveal_probability if r else 1 - reveal_probability for r in revealed)
        for words in itertools.product(range(VOCAB), repeat=len(chosen)):
            state = list(x_t)
            for n, word in zip(chosen, words, strict=True):
                state[n] = word
            yield (
                tuple(state),
                p_positions * math.exp(sum(log_probs[n, w].item() for n, w in zip(chosen, words, strict=True))),
            )


def exact_ancestral(denoiser, schedule, num_steps):
    """The law of the finished text, by dynamic programming over all partly masked states."""
    states = {(0, MASK, MASK, MASK): 1.0}
    for step in range(num_steps):
        t, s = (torch.tensor(1 - (step + k) / num_steps, dtype=torch.float64) for k in (0, 1))
        u = 1 - (schedule.mask_probability(s) / schedule.mask_probability(t)).item()
        following = {}
        for x_t, probability in states.items():
            for state, p in transition(denoiser, x_t, u):
                following[state] = following.get(state, 0.0) + probability * p
        states = following
    return states


def chi_square_z(counts, probabilities, num_samples):
    """Standardised chi-square statistic over cells that expect at least 5."""
    cells = [(counts.get(state, 0), p * num_samples) for state, p in probabilities.items() if p * num_samples >= 5]
    rest = num_samples - sum(n for n, _ in cells), num_samples - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    return (statistic - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


def tally(ids):
    states, counts = np.unique(ids.numpy(), axis=0, return_counts=True)
    return {tuple(int(word) for word in state): int(n) for state, n in zip(states, counts, strict=True)}


def exact_by_states(num_steps, step_of):
    """The law of the finished text; step_of(x_t, step) yields (state, probability) of the next states."""
    states = {(0, MASK, MASK, MASK): 1.0}
    for step in range(num_steps):
        following = {}
        for x_t, probability in states.items():
            for state, p in step_of(x_t, step):
                following[state] = following.get(state, 0.0) + probability * p
        states = following
    return states


def independent_positions(x_t, outcomes):
    """Next states when every masked position n becomes v with probability outcomes[n][v], and stays masked with what is
    missing.
    """
    masked = [n for n in range(1, 1 + LENGTH) if x_t[n] == MASK]
    for words in itertools.product([*range(VOCAB), MASK], repeat=len(masked)):
        state, p = list(x_t), 1.0
        for n, word in zip(masked, words, strict=True):
            state[n] = word
            p *= outcomes[n][word] if word != MASK else max(0.0, 1 - float(outcomes[n].sum()))
        if p > 0:
            yield tuple(state), float(p)
