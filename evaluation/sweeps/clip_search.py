"""The clip search on a trained model: which masking interval to train a block size with (BD3-LM, section 5.2).

It gives a table of the candidates, a heat map, and the clip with the least variance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from dlm_ray.evaluation.studies.variance import draw_variances
from dlm_ray.evaluation.trained import stack, visibility_of

from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import local_path
from dlm_ray.data.index import load_index
from dlm_ray.data.reading import DataSequence, read_split
from dlm_ray.diffusion import clip_search
from dlm_ray.diffusion.absorbing import Absorbing, Clip
from dlm_ray.diffusion.clip_search import ClipStatistics
from dlm_ray.diffusion.objectives import Block
from dlm_ray.generation.text_model import TextModel
from dlm_ray.report import figures

Progress = Callable[[int, int], None]


def search(
    model: TextModel,
    data: str,
    block_tokens: int | None = None,
    *,
    split: str = "held_out",
    num_sequences: int = 64,
    num_draws: int = 4,
    num_gradients: int = 0,
    gradient_sequences: int = 16,
    enforce: Literal["none", "counts"] = "none",
    seed: int = 0,
    micro_batch_size: int = 16,
    progress: Progress = lambda done, total: None,
) -> list[ClipStatistics]:
    """Measure the paper's 36 intervals on a trained model and return them, the least variance first.

    Args:
        model: a diffusion model. It is measured in blocks of `block_tokens`, whatever it was trained with.
        data: a data folder with the model's tokenizer.
        block_tokens: K; the model's own if None, or the whole sequence if it has none.
        split: the split of the data.
        num_sequences, num_draws: the sequences that every candidate is measured on, and the draws of each.
        num_gradients: draws for the variance of a batch's gradient. Each costs a backward pass per candidate; 0
            leaves it out.
        gradient_sequences: the number of sequences in that batch.
        enforce: the value of `objective.clip.enforce` in training.
        seed: the seed of the draws, which all candidates share.
        micro_batch_size: sequences per network call.
        progress: called with (steps done, all steps).

    Raises:
        UserError: for an autoregressive model, blocks of 1, blocks that do not divide the data's sequences, data of
            another tokenizer, or a split without sequences.
    """
    size = block_tokens or getattr(model.objective, "block_tokens", load_index(data).sequence_length)
    _check(model, data, size)
    sequences = _sequences(data, split, num_sequences)
    objective, clips = Block(block_tokens=size), clip_search.candidates(enforce)
    num_batches = -(-len(sequences) * num_draws // micro_batch_size)
    num_steps = num_batches + (len(clips) if num_gradients else 0)
    with torch.no_grad():
        totals = clip_search.clip_sums(
            lambda batch, draws: objective.nll_of_draws(model.denoiser, batch, draws),
            objective,
            clips,
            *stack(sequences),
            visibility_of(model),
            model.device,
            num_draws=num_draws,
            seed=seed,
            micro_batch_size=micro_batch_size,
            progress=lambda done, _: progress(done, num_steps),
        )
    candidates = clip_search.clip_statistics(clips, totals)
    if not num_gradients:
        return candidates
    batch = sequences[:gradient_sequences]
    return _with_gradients(
        candidates,
        lambda clip: _gradient_variance(model, clip, size, batch, num_gradients, seed),
        clips,
        lambda done: progress(num_batches + done, num_steps),
    )


def _with_gradients(
    candidates: Sequence[ClipStatistics],
    variance_of: Callable[[Clip], float],
    clips: Sequence[Clip],
    progress: Callable[[int], None],
) -> list[ClipStatistics]:
    """Return the candidates with the variance of the gradient; `progress` is called with the number of those done."""
    clip_of = {(clip.beta, clip.omega): clip for clip in clips}
    results = []
    for done, candidate in enumerate(candidates, 1):
        variance = variance_of(clip_of[candidate.beta, candidate.omega])
        results.append(replace(candidate, gradient_variance=variance))
        progress(done)
    return results


def _sequences(data: str, split: str, num_sequences: int) -> list[DataSequence]:
    """Return sequences of a split.

    Raises:
        UserError: if it has none.
    """
    sequences = read_split(data, split, num_sequences)
    if not sequences:
        raise UserError(f"split {split!r} of {data} has no sequences; build the data with a larger `held_out`")
    return sequences


def _gradient_variance(
    model: TextModel, clip: Clip, block_tokens: int, batch: Sequence[DataSequence], num_gradients: int, seed: int
) -> float:
    """Return the variance of the gradient of one batch under a clip; see `draw_variances`."""
    objective = Block(Absorbing(clip=clip), block_tokens=block_tokens)
    variances = draw_variances(model, objective, batch, num_losses=2, num_gradients=num_gradients, seed=seed)
    return variances["gradient_variance"]


def write(candidates: Sequence[ClipStatistics], out: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write clip_search.json, and clip_search.svg with a heat map of the variance over beta and omega.

    Args:
        candidates: the result of `search`.
        out: the folder for the files.
        about: fields that describe the search; `block_tokens` is needed.

    Returns:
        The paths of the files.
    """
    local_path(out, "out").mkdir(parents=True, exist_ok=True)
    table, figure = out / "clip_search.json", out / "clip_search.svg"
    fields = {**about, "candidates": [asdict(candidate) for candidate in candidates]}
    table.write_text(json.dumps(fields, indent=1) + "\n")
    full_range_beta = clip_search.FULL_RANGE[0]
    cells = {(one.beta if one.beta > full_range_beta else 0.0, one.omega): one.variance for one in candidates}
    title = f"variance of a block's bound, K = {about['block_tokens']}"
    figures.heat_map(cells, "beta", "omega", title).savefig(
        figure, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    return [table, figure]


def _check(model: TextModel, data: str, block_tokens: int | None) -> None:
    """Raise a UserError if the model or the data has nothing to search."""
    if model.is_causal:
        raise UserError("this checkpoint is autoregressive and has no masks to clip; adapt it first")
    if model.objective.likelihood == "none":
        raise UserError(
            "this checkpoint's objective (ssd_lm) has no masks to clip; use a checkpoint that was trained with masks"
        )
    index = load_index(data)
    allowed = [number for number in range(2, index.sequence_length + 1) if index.sequence_length % number == 0]
    if block_tokens not in allowed:
        numbers = ", ".join(map(str, allowed))
        fix = "train blocks of 1 with objective.mask_sampler=count, which leaves them no variance"
        raise UserError.of(
            "block_tokens",
            block_tokens,
            f"must be one of {numbers} for sequences of {index.sequence_length} tokens",
            fix if block_tokens == 1 else "",
        )
    tokenizer = model.tokenizer_identity
    if index.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"{data} was built with tokenizer {index.tokenizer.name} ({index.tokenizer.sha256[:12]}) and the "
            f"checkpoint with {tokenizer.name} ({tokenizer.sha256[:12]}); give another `data` folder"
        )
