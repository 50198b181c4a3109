"""A denoiser small enough to enumerate.

3 tokens after a start token, 4 words, logits from a table that sees the whole masked row.
"""

import itertools
import math

import torch

START, VOCAB, LENGTH = 0, 4, 3
MASK = VOCAB


class TableDenoiser(torch.nn.Module):
    """Logits depend on every token of the row through random tables.

    Without shift, so that row i predicts position i.
    """

    mask_id = MASK

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(1 + LENGTH, VOCAB + 1, 1 + LENGTH, VOCAB, generator=generator, dtype=torch.float64)

    def hidden(self, input_ids, visibility):
        """[B, L] -> [B, L, V]: the logits themselves serve as hidden rows."""
        position = torch.arange(input_ids.shape[1])
        # A product over positions makes the logits no mere sum of single tokens' effects.
        effects = self.table[position[None], input_ids]  # [B, L(source), L(target), V]
        return effects.sum(1) + 0.5 * torch.tanh(effects).prod(1)

    def reduce_logits(self, rows, fn, *arguments):
        return fn(rows, *arguments)

    def rows_for(self, positions):
        return positions

    def log_probs(self, x_t):
        """[L] tokens with masks -> [L, V]."""
        return self.hidden(x_t[None], None)[0].log_softmax(-1)


def texts():
    return [torch.tensor([START, *words]) for words in itertools.product(range(VOCAB), repeat=LENGTH)]


def exact_nelbo(denoiser, x_0):
    """The bound without any sampling of t.

    Sum over sets S of masked positions of (1 / (k C(N, k))) * cross-entropy on S, k = |S|.
    """
    total = 0.0
    for k in range(1, LENGTH + 1):
        for chosen in itertools.combinations(range(1, 1 + LENGTH), k):
            x_t = x_0.clone()
            x_t[list(chosen)] = MASK
            log_probs = denoiser.log_probs(x_t)
            cross_entropy = -sum(log_probs[n, x_0[n]].item() for n in chosen)
            total += cross_entropy / (k * math.comb(LENGTH, k))
    return total
