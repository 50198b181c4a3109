"""The inputs and the result of a generation: canvas, forced tokens, and the texts with their cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from dlm_ray.config.errors import UserError
from dlm_ray.diffusion.samplers.requests import StoppedBy
from dlm_ray.diffusion.samplers.rules import Canvas


class GeneratedTexts(list[str]):
    """The texts of one batch, and the number of network calls that they took.

    Args:
        texts: without their prompts.
        network_calls: calls for the whole batch: `denoising`, and `cache` for those that only fill the KV cache
            (prompts, finished blocks).
        stopped_by: for each text `length`, or the rule of `stop` that ended it.
    """

    def __init__(self, texts: Iterable[str], network_calls: dict[str, int], stopped_by: Sequence[StoppedBy]):
        super().__init__(texts)
        self.network_calls = network_calls
        self.stopped_by = list(stopped_by)


def masked_canvas(
    prompt: Sequence[int],
    length: int,
    suffix_ids: Sequence[int],
    filler_id: int,
    num_samples: int,
    device: torch.device,
) -> Canvas:
    """Return the canvas [prompt, `length` masked tokens, suffix], `num_samples` times; masked ids are `filler_id`."""
    ids = torch.tensor([*prompt, *[filler_id] * length, *suffix_ids], device=device)
    is_masked = torch.zeros(len(ids), dtype=torch.bool, device=device)
    is_masked[len(prompt) : len(prompt) + length] = True
    return Canvas(ids.repeat(num_samples, 1), is_masked.repeat(num_samples, 1))


def forced_tokens(
    force: Mapping[int, str], encode: Callable[[str], list[int]], start: int, length: int
) -> dict[int, int]:
    """Return the forced token of each absolute position.

    Args:
        force: texts by their offset from the end of the prompt, in tokens.
        encode: text -> ids.
        start: position of the first generated token.
        length: generated tokens.

    Raises:
        UserError: if a text is not within the generated tokens, or two texts force different tokens at a position.
    """
    tokens: dict[int, int] = {}
    for offset, text in force.items():
        for position, token in enumerate(encode(text), start=offset):
            if not 0 <= position < length:
                allowed = f"token {position} is not among the {length} generated tokens, 0 to {length - 1}"
                raise UserError.of("force", f"{offset}={text}", allowed)
            if tokens.setdefault(start + position, token) != token:
                allowed = f"another text is forced at token {position}"
                raise UserError.of("force", f"{offset}={text}", allowed, "move either")
    return tokens
