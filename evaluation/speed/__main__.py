"""`python -m dlm_ray.evaluation.speed train|objectives|sample|serving|checkpoint... --shape NAME`: what steps, calls and saves cost, as ratios in one run.

`train` compares masked and block diffusion with AR, and block diffusion with the way of BD3-LM's code; `objectives` compares the others with the
masked one. All train the same network with the same head, optimizer and data; AR attends causally without a mask. Steps are interleaved, so that
whatever else the machine does hits all. Beside AR, the ratio that FLOPs allow says what could be expected, and the matrix-product peak of
this machine what was left. `sample` is in `sampling.py`, `serving` in `serving.py`, `checkpoint` in `checkpoint.py`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from dlm_ray.evaluation.speed import checkpoint, sampling, serving
from dlm_ray.evaluation.speed.reference import ReferenceBlock
from dlm_ray.evaluation.speed.sampling import timed
from torch.distributed.device_mesh import init_device_mesh

from dlm_ray.config.load import validate
from dlm_ray.config.paths import folder_argument
from dlm_ray.config.recipe import Recipe
from dlm_ray.models import families
from dlm_ray.training import optimizer as optimization
from dlm_ray.training import setup
from dlm_ray.training.metrics import flops_per_token
from dlm_ray.training.step import micro_batches, train_step

REPETITIONS = 7
_MEASURED = {"sample": "sampling", "serving": "serving", "checkpoint": "saving and loading"}
COMPARED = {
    "train": ("autoregressive", "masked", "block", "block, two passes", "block, reference"),
    "objectives": ("masked", "sedd", "genmd4", "d3pm", "tauldr", "ssd_lm"),
}
# BD3-LM's blocks of 16, with the clip that its table recommends and the counts that its code enforces.
BLOCK_TOKENS, CLIP = 16, {"beta": 0.3, "omega": 0.8, "weight": "paper", "enforce": "counts"}


@dataclass(frozen=True)
class Shape:
    """A network and a batch."""

    width: int
    num_layers: int
    num_heads: int
    sequence_length: int
    vocab_size: int
    rows: int
    tie_embeddings: bool


SHAPES = {
    "quickstart": Shape(
        width=256, num_layers=4, num_heads=4, sequence_length=256, vocab_size=4096, rows=16, tie_embeddings=True
    ),
    "medium": Shape(
        width=512, num_layers=8, num_heads=8, sequence_length=256, vocab_size=16_384, rows=8, tie_embeddings=True
    ),
    # BD3-LM's small network on LM1B (arXiv 2503.09573, appendix C), with a gated feed-forward of the same size.
    "bd3-small": Shape(
        width=768, num_layers=12, num_heads=12, sequence_length=128, vocab_size=30_522, rows=8, tie_embeddings=False
    ),
}


class _Row(NamedTuple):
    """What `micro_batches` wants of a row."""

    input_ids: np.ndarray
    document_ids: np.ndarray


def measure(what: str, shape_name: str, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Tokens a second of training steps of the objectives of COMPARED[what] on this machine, and their ratios.

    A step is everything between rows and updated weights: draws, forward, backward, clipping, AdamW, in one FSDP2 process.
    """
    shape = SHAPES[shape_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        steps = {name: _stepper(shape, name, device) for name in COMPARED[what]}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        peak = 0.0
        for repetition in range(repetitions + 1):
            peak = max(peak, _matrix_product_flops(device))
            for name, step in steps.items():
                elapsed = timed(lambda run=step, number=repetition: run(number), device)
                if repetition:  # the first pays for warming up
                    seconds[name].append(elapsed)
    finally:
        dist.destroy_process_group()
    result = _common(what, shape_name, shape, device, seconds)
    return result | (
        _beside_ar(shape, result["tokens_per_second"], peak) if what == "train" else _beside_masked(seconds)
    )


def _stepper(shape: Shape, name: str, device: torch.device) -> Callable[[int], None]:
    """A function that runs training step number n."""
    recipe = _recipe(shape, name)
    is_causal = setup.is_causal(recipe)
    mask_id = None if is_causal else shape.vocab_size
    assert recipe.model.architecture is not None, "the recipe is from scratch"
    config = families.scratch_config(recipe.model.architecture, shape.vocab_size + (mask_id is not None), 0, 0)
    network = setup.Network(config.to_dict(), mask_id, recipe.objective.shift, is_causal)
    objective = _variant(name, setup.build_objective(recipe, network, shape.sequence_length))
    root, denoiser = setup.build(recipe, network, objective, init_device_mesh(device.type, (1,)), device)
    setup.init_weights(recipe, network, denoiser, objective)
    optimizer = optimization.build(recipe.optimizer, root)
    random = np.random.default_rng(0)
    documents = np.zeros(shape.sequence_length, dtype=np.int32)
    rows = [_Row(random.integers(0, shape.vocab_size, shape.sequence_length), documents) for _ in range(shape.rows)]

    def step(number: int) -> None:
        batches = micro_batches(recipe, objective, rows, number, 0, 1, device)
        train_step(root, objective, optimizer, batches, 1.0, None)

    return step


def _variant(name: str, objective: Any) -> Any:
    """Block diffusion in the two ways that it is compared with."""
    if name == "block, two passes":
        objective.passes = "two"
    if name == "block, reference":
        return ReferenceBlock(objective.process, block_tokens=objective.block_tokens)
    return objective


def _recipe(shape: Shape, name: str) -> Recipe:
    name, comma, _ = name.partition(",")
    block = {"block_tokens": BLOCK_TOKENS, "clip": CLIP, "shift": False} if name == "block" else {}
    architecture = {
        "width": shape.width,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "max_positions": shape.sequence_length,
        "tie_embeddings": shape.tie_embeddings,
    }
    tree = {
        "name": f"speed-{name}",
        "model": {"architecture": architecture},
        "data": {"sources": [{"path": "none"}]},
        "objective": {"name": name, **block},
        "training": {
            "steps": 1,
            "global_batch_size": shape.rows,
            "micro_batch_size": shape.rows,
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
    }
    return validate(tree, tree["name"])


def _matrix_product_flops(device: torch.device) -> float:
    """FLOPs a second of a large matrix product, the best of 3, in the precision of the steps."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(3))


def measure_sampling(shape_name: str, repetitions: int) -> dict[str, Any]:
    """What block sampling costs on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[shape_name]
    architecture = _recipe(shape, "masked").model.architecture
    return _about("sample", shape_name, device) | sampling.measure(architecture, shape.vocab_size, repetitions, device)


def measure_serving(shape_name: str, repetitions: int, seconds: float) -> dict[str, Any]:
    """What the engine and the service cost on this machine, on one thread; the clients take theirs of the other cores."""
    torch.set_num_threads(1)
    shape = SHAPES[shape_name]
    about = _about("serving", shape_name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    architecture = _recipe(shape, "masked").model.architecture
    return about | serving.measure(architecture, shape.vocab_size, repetitions, seconds)


def _about(what: str, shape_name: str, device: torch.device) -> dict[str, Any]:
    return {
        "what": f"{_MEASURED.get(what, 'training step')}, shape {shape_name}",
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "command": f"python -m dlm_ray.evaluation.speed {what} --shape {shape_name}",
    }


def _common(
    what: str, shape_name: str, shape: Shape, device: torch.device, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    tokens = shape.rows * shape.sequence_length
    return _about(what, shape_name, device) | {
        "repetitions": len(seconds["masked"]),
        "tokens_per_second": {name: round(tokens / statistics.median(times), 1) for name, times in seconds.items()},
        "seconds": {name: [round(one, 4) for one in times] for name, times in seconds.items()},
    }


def _beside_ar(shape: Shape, rate: dict[str, float], peak: float) -> dict[str, Any]:
    """Each over AR, what FLOPs allow, and what is left to the machine's own peak."""
    gated = -(-8 * shape.width // 3 // 64) * 64
    sizes = {
        "body_parameters": shape.num_layers * (4 * shape.width**2 + 3 * shape.width * gated),
        "width": shape.width,
        "num_layers": shape.num_layers,
        "num_positions": shape.sequence_length,
        "vocab_size": shape.vocab_size,
    }
    scored = (shape.sequence_length - 1) / shape.sequence_length  # the start token is not
    halves = {**sizes, "body_parameters": 2 * sizes["body_parameters"]}  # x_t and x_0
    flops = {
        "autoregressive": flops_per_token(**sizes, scored_share=scored, visible_share=0.5),
        "masked": flops_per_token(**sizes, scored_share=scored / 2, visible_share=1.0),
        "block": flops_per_token(
            **halves,
            scored_share=scored * (CLIP["beta"] + CLIP["omega"]) / 2,
            visible_share=1 + BLOCK_TOKENS / shape.sequence_length,
        ),
    }
    ratio = {name: own / rate["autoregressive"] for name, own in rate.items()}
    allowed = {name: flops["autoregressive"] / own for name, own in flops.items()}
    return {
        "ratio_to_ar": {name: round(value, 3) for name, value in ratio.items()},
        "ratio_that_flops_allow": {name: round(value, 3) for name, value in allowed.items()},
        "share_of_the_allowed_ratio": {name: round(ratio[name] / value, 3) for name, value in allowed.items()},
        "block_over_reference": round(rate["block"] / rate["block, reference"], 3),
        "block_over_two_passes": round(rate["block"] / rate["block, two passes"], 3),
        "matrix_product_gflops": round(peak / 1e9, 1),
        "fraction_of_matrix_product_peak": {name: round(rate[name] * own / peak, 3) for name, own in flops.items()},
    }


def _beside_masked(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Step time over that of `masked`: the median over the repetitions of the ratio within one, and its quartiles."""
    ratios = {
        name: [own / masked for own, masked in zip(times, seconds["masked"], strict=True)]
        for name, times in seconds.items()
    }
    return {
        "step_time_relative_to_masked": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "quartiles": {
            name: [round(edge, 3) for edge in statistics.quantiles(values, n=4)] for name, values in ratios.items()
        },
    }


def measure_checkpoint(shape_name: str, repetitions: int, folder: Path | None) -> dict[str, Any]:
    """What saving and loading cost on this machine, beside torch.distributed.checkpoint."""
    shape = SHAPES[shape_name]
    about = _about("checkpoint", shape_name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about["tensorstore"] = importlib.metadata.version("tensorstore")
    return about | checkpoint.measure(_recipe(shape, "autoregressive"), shape.vocab_size, repetitions, folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dlm_ray.evaluation.speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("what", nargs="+", choices=[*COMPARED, "sample", "serving", "checkpoint"])
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--seconds", type=float, default=120.0, help="of serving: so long clients go on asking")
    parser.add_argument("--folder", type=folder_argument, help="of checkpoint: on the disk that is measured")
    parser.add_argument("--out", type=folder_argument, help="a folder that gets speed_<what>_<shape>.json")
    arguments = parser.parse_args()
    shape, repetitions = arguments.shape, arguments.repetitions
    for what in arguments.what:
        torch.set_num_threads(os.cpu_count() or 1)
        if what == "sample":
            found = measure_sampling(shape, repetitions)
        elif what == "serving":
            found = measure_serving(shape, repetitions, arguments.seconds)
        elif what == "checkpoint":
            found = measure_checkpoint(shape, repetitions, arguments.folder)
        else:
            found = measure(what, shape, repetitions)
        text = json.dumps(found, indent=2) + "\n"
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"speed_{what}_{shape}.json").write_text(text)
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
