"""The oracle of the block sampler: one sequence, two passes per block, no cache, no slots.

Every step of a block is one dense pass over the whole context and the partly masked block, and every finished block
takes a pass of its own. The rules are those of the library, with a batch of one; all else is reference again.
"""

from dataclasses import dataclass, field

import torch

from dlm_ray.diffusion.draws import SAMPLING, generator
from dlm_ray.diffusion.samplers.rules import Canvas
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models.attention import PreparedVisibility


@dataclass
class Reference:
    ids: list = field(default_factory=list)
    stopped_by: str = "length"
    logits: list = field(default_factory=list)
    """Adjusted logits [n, V] of every step that samples n tokens."""
    num_denoising: int = 0
    num_committing: int = 0
    num_encoding: int = 0
    """Passes over prompts and over contexts that are encoded again."""
    num_shared: int = 0
    """Committing passes that the first pass over the next block makes unnecessary."""

    @property
    def num_calls(self):
        return self.num_denoising + self.num_committing + self.num_encoding


@torch.no_grad()
def two_passes(denoiser, request, rule, *, block_tokens, context_tokens, **options):
    """Return what block sampling writes for one request, and the passes that two per block take.

    `options` are those of `_denoise`.
    """
    size, reference, ids = block_tokens, Reference(), list(request.prompt)
    start = len(ids) // size * size
    context = ids[:start]
    reference.num_encoding += start > 0
    is_full = True
    while True:
        block = ids[start:] + [denoiser.mask_id] * (size - (len(ids) - start))
        block = _denoise(reference, denoiser, request, rule, context, block, start, is_full, **options)
        ids = ids[:start] + block
        new, end = ids[len(request.prompt) :][: request.length_tokens], request.stops.end_id
        if end in new:
            reference.ids, reference.stopped_by = new[: new.index(end) + 1], "end"
            return reference
        if len(new) == request.length_tokens:
            reference.ids = new
            return reference
        context, start = context + block, start + size
        reference.num_committing += 1
        if is_full := len(context) == context_tokens:
            keep = max(size, context_tokens // 2 // size * size)
            context = [ids[0], *ids[start - keep + 1 : start]]
            reference.num_encoding += 1
            reference.num_shared += 1  # the context is encoded again with the block


def _denoise(
    reference,
    denoiser,
    request,
    rule,
    context,
    block,
    start,
    is_committed,
    num_steps=1,
    temperature=1.0,
    top_p=1.0,
    adjust=None,
    shift=True,
    is_context_causal=False,
):
    """Return the finished block; a pass is counted unless only the first position is wanted, with shift."""
    size, mask = len(block), denoiser.mask_id
    is_open = torch.tensor([[token == mask for token in block]])
    random = generator(request.seed, SAMPLING, start // size, request.number)
    for step in range(num_steps if rule.is_timed else size):
        numbers = torch.from_numpy(random.random((2, size)))
        t = torch.tensor([1 - step / num_steps], dtype=torch.float64)
        s = torch.tensor([1 - (step + 1) / num_steps if step + 1 < num_steps else 0.0], dtype=torch.float64)
        if step == 0:
            t = torch.ones(1, dtype=torch.float64)
        ids = torch.tensor([block])
        canvas = Canvas(ids, ids == mask, is_open)
        wanted = rule.wanted(canvas, t, s, numbers[1][None])
        remasked = rule.remasked(canvas, t, s, numbers[1][None])[0]
        confidence = torch.full((1, size), float("-inf"), dtype=torch.float64)
        places = wanted[0].nonzero()[:, 0].tolist()
        sampled = {}
        if places:
            needs_block = not shift or places != [0]
            reference.num_denoising += needs_block
            reference.num_shared += needs_block and not is_committed
            is_committed = True
            hidden = _hidden(denoiser, context + block, size, is_context_causal)
            rows = hidden[[len(context) + place - shift for place in places]]
            logits = denoiser.reduce_logits(rows, lambda logits: logits)
            if adjust is not None:
                positions = torch.tensor([start + place for place in places])
                logits = adjust(logits, torch.full_like(positions, request.number), positions)
            reference.logits.append(logits)
            for place, row in zip(places, logits.double(), strict=True):
                sampled[place] = _token(row, float(numbers[0, place]), temperature, top_p)
                confidence[0, place] = _confidence(row, sampled[place], rule.confidence)
        selected = rule.selected(canvas, wanted, confidence, t, s)[0]
        block = [
            mask if remasked[place] else sampled[place] if selected[place] else block[place] for place in range(size)
        ]
        if mask not in block and not rule.remasks:
            break
    assert mask not in block
    return block


def _hidden(denoiser, ids, size, is_context_causal):
    """Return the hidden states [L, D] of one dense pass; the last `size` positions are the block."""
    if not is_context_causal:
        return denoiser.hidden(torch.tensor([ids]), Visibility("bidirectional", block_tokens=size))[0]
    place = torch.arange(len(ids))
    in_block = place >= len(ids) - size
    mask = (place[None] <= place[:, None]) | (in_block[None] & in_block[:, None])
    visibility = PreparedVisibility("sdpa", mask=mask[None, None])
    output = denoiser.network.base_model(torch.tensor([ids]), use_cache=False, visibility=visibility)
    return output.last_hidden_state[0]


def _token(logits, uniform, temperature, top_p):
    """Return the token at `uniform` of the cumulative distribution, in the order of the ids."""
    if temperature == 0:
        return int(logits.argmax())
    probs = ((logits - logits.max()) / temperature).exp()
    probs = probs / probs.sum()
    if top_p < 1:
        order, mass = probs.argsort(descending=True).tolist(), 0.0
        for token in order:
            if mass >= top_p:
                probs[token] = 0.0
            else:
                mass += float(probs[token])
        probs = probs / probs.sum()
    return int((probs.cumsum(0) <= uniform * probs.sum()).sum())


def _confidence(logits, token, ranking):
    log_probs = logits.log_softmax(0)
    if ranking == "margin":
        first, second = log_probs.exp().topk(2).values
        return float(first - second)
    if ranking == "entropy":
        probs = log_probs.exp()
        return float(torch.special.xlogy(probs, probs).sum())
    return float(log_probs[token])
