"""The clip search on a checkpoint that is there: a table, a heat map, and the clip to train a block size with (BD3-LM, section 5.2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from dlm_ray.evaluation.studies.variance import over_draws

from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import local_path
from dlm_ray.data.index import load_index
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion import clip_search
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.clip_search import Measured
from dlm_ray.diffusion.objectives import Block
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.generation.text_model import TextModel
from dlm_ray.report import figures

Progress = Callable[[int, int], None]


def search(
    model: TextModel,
    data: str,
    block_tokens: int | None = None,
    *,
    split: str = "held_out",
    rows: int = 64,
    draws: int = 4,
    gradients: int = 0,
    gradient_sequences: int = 16,
    enforce: Literal["none", "counts"] = "none",
    seed: int = 0,
    micro_batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Measured]:
    """The paper's 36 intervals on a trained model, the least variance first.

    Args:
        model: a diffusion model; whatever it was trained with, it is measured in blocks of `block_tokens`.
        data: a folder that was built with its tokenizer.
        block_tokens: K; the checkpoint's own if None.
        split, rows, draws: what every candidate is measured on.
        gradients: draws for the variance of the gradient of a batch of `gradient_sequences` rows, beside; 0 leaves it out, because it costs that many
            backward passes a candidate.
        enforce: as `objective.clip.enforce` would be.
        seed: of the draws, common to all candidates.
        micro_batch_size: of a network call.
        progress: called with (done, all).

    Raises:
        UserError: for an autoregressive checkpoint, blocks of 1, blocks that do not tile the data's rows, or another tokenizer's data.
    """
    size = block_tokens or getattr(model.objective, "block_tokens", load_index(data).sequence_length)
    _check(model, data, size)
    assert size is not None, "checked"
    held_out = read_split(data, split, rows)
    if not held_out:
        raise UserError(f"split {split!r} of {data} has no rows; build it with a larger --held-out")
    x_0 = np.stack([row.input_ids for row in held_out]).astype(np.int64)
    document_ids = np.stack([row.document_ids for row in held_out]).astype(np.int32)
    objective, clips = Block(block_tokens=size), clip_search.candidates(enforce)
    num_batches = -(-len(held_out) * draws // micro_batch_size)
    whole = num_batches + (len(clips) if gradients else 0)
    step = progress or (lambda done, total: None)
    with torch.no_grad():
        totals = clip_search.sums(
            lambda batch, own: objective.nll_of_draws(model.denoiser, batch, own),
            objective,
            clips,
            x_0,
            document_ids,
            lambda ids: Visibility(
                "bidirectional", document_ids=documents_apart(ids, model.document_mask, model.device)
            ),
            model.device,
            num_draws=draws,
            seed=seed,
            micro_batch_size=micro_batch_size,
            progress=lambda done, _: step(done, whole),
        )
    found = clip_search.measured(clips, totals)
    if not gradients:
        return found
    by_interval = {(clip.beta, clip.omega): clip for clip in clips}
    with_gradients = []
    for number, one in enumerate(found):
        own = Block(Absorbing(clip=by_interval[one.beta, one.omega]), block_tokens=size)
        measured = over_draws(
            model.denoiser,
            own,
            held_out[:gradient_sequences],
            document_mask=model.document_mask,
            num_losses=2,
            num_gradients=gradients,
            seed=seed,
        )
        with_gradients.append(replace(one, gradient_variance=measured["gradient_variance"]))
        step(num_batches + number + 1, whole)
    return with_gradients


def write(found: list[Measured], out: Path, about: dict[str, Any]) -> list[Path]:
    """clip_search.json and clip_search.svg, a heat map of the variance over beta and omega, into the folder `out`."""
    local_path(out, "out").mkdir(parents=True, exist_ok=True)
    paths = [out / "clip_search.json", out / "clip_search.svg"]
    paths[0].write_text(json.dumps({**about, "candidates": [asdict(one) for one in found]}, indent=1) + "\n")
    cells = {(one.beta if one.beta > 1e-3 else 0.0, one.omega): one.variance for one in found}
    title = f"variance of a block's bound, K = {about['block_tokens']}"
    figures.heat_map(cells, "beta", "omega", title).savefig(
        paths[1], format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    return paths


def _check(model: TextModel, data: str, block_tokens: int | None) -> None:
    if model.is_causal:
        raise UserError("this checkpoint is autoregressive: it has no masks to clip; adapt it first")
    if model.objective.likelihood == "none":
        raise UserError(
            "this checkpoint's objective (ssd_lm) has no masks to clip; name one that was trained with masks"
        )
    index = load_index(data)
    allowed = [number for number in range(2, index.sequence_length + 1) if index.sequence_length % number == 0]
    if block_tokens not in allowed:
        why = (
            "masking everything leaves blocks of 1 no variance: train them with objective.mask_sampler=count"
            if block_tokens == 1
            else ""
        )
        raise UserError(
            f"--block-tokens {block_tokens} on rows of {index.sequence_length}: allowed are {', '.join(map(str, allowed))}"
            + (f"; {why}" if why else "")
        )
    theirs = index.tokenizer
    if theirs.sha256 != model.tokenizer_identity.sha256:
        raise UserError(
            f"{data} was made with tokenizer {theirs.name} ({theirs.sha256[:12]}) and the checkpoint with {model.tokenizer_identity.name} "
            f"({model.tokenizer_identity.sha256[:12]}); name another --data"
        )
