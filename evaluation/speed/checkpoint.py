"""What a checkpoint costs beside torch.distributed.checkpoint's file writer, as ratios in one run, and what each does with a flipped bit.

The state is the network of a shape with AdamW's moments, sharded by FSDP2 over this one process, and saved to the same disk by turns.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dlm_ray.checkpoint import commit
from dlm_ray.config.recipe import Checkpoint, Recipe
from dlm_ray.models import families
from dlm_ray.training import optimizer as optimization
from dlm_ray.training import setup, state
from dlm_ray.training.saving import Saver

FIELDS: dict[str, Any] = {
    "recipe": {},
    "tokenizer": {},
    "model": {},
    "capabilities": {},
    "cursor": {},
    "extra": {"metrics": {}},
}
FLIPS = 8


def measure(recipe: Recipe, vocab_size: int, repetitions: int, folder: Path | None) -> dict[str, Any]:
    """Seconds of saving and loading, ratios within a repetition, and what became of flipped bits.

    Args:
        recipe: its architecture is the network's.
        vocab_size: of the network.
        repetitions: after one that warms up: it makes the buffers of the asynchronous save.
        folder: on the disk that is measured; the system's temporary one if None.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        return _measured(_state(recipe, vocab_size, device), place, repetitions)
    finally:
        shutil.rmtree(place)
        dist.destroy_process_group()


def _measured(tensors: dict[str, Tensor], place: Path, repetitions: int) -> dict[str, Any]:
    saver = Saver(Checkpoint(), place / "asynchronous", rank=0)
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    seconds: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):
        ours, theirs = str(place / f"ours-{repetition}"), str(place / f"dcp-{repetition}")
        acts: dict[str, Callable[[], Any]] = {
            "save": lambda path=ours: commit.save(path, tensors, {**FIELDS, "step": 1}),
            "dcp_save": lambda path=theirs: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path)),
            "blocked_by_asynchronous_save": lambda step=repetition + 1: saver.begin(
                step, tensors, {**FIELDS, "step": step}, {}
            ),
            "rest_of_asynchronous_save": lambda: saver.end(has_to_succeed=True),
            "load": lambda path=ours: commit.load(path, target),
            "dcp_load": lambda path=theirs: dcp.load(target, storage_reader=dcp.FileSystemReader(path)),
        }
        for name, act in acts.items():
            elapsed = _timed(act)
            if name.endswith("load"):
                _check_equal(target, tensors, name)
            if repetition:
                seconds.setdefault(name, []).append(elapsed)
        if repetition < repetitions:
            shutil.rmtree(ours)
            shutil.rmtree(theirs)
    saver.close()
    flips = {"ours": _flipped(Path(ours), lambda: commit.load(ours, target), target, tensors)}
    flips["torch.distributed.checkpoint"] = _flipped(
        Path(theirs), lambda: dcp.load(target, storage_reader=dcp.FileSystemReader(theirs)), target, tensors
    )
    return {
        "state_mib": round(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20),
        "num_tensors": len(tensors),
        "repetitions": repetitions,
        "median_seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "save_over_dcp": _ratio(seconds["save"], seconds["dcp_save"]),
        "load_over_dcp": _ratio(seconds["load"], seconds["dcp_load"]),
        "blocked_over_synchronous_save": _ratio(seconds["blocked_by_asynchronous_save"], seconds["save"]),
        "flipped_bits": flips,
        "seconds": {name: [round(one, 4) for one in times] for name, times in seconds.items()},
    }


def _state(recipe: Recipe, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    assert recipe.model.architecture is not None, "the recipe is from scratch"
    config = families.scratch_config(recipe.model.architecture, vocab_size, 0, 0)
    network = setup.Network(config.to_dict(), None, recipe.objective.shift, True)
    objective = setup.build_objective(recipe, network, recipe.model.architecture.max_positions)
    root, denoiser = setup.build(recipe, network, objective, init_device_mesh(device.type, (1,)), device)
    setup.init_weights(recipe, network, denoiser, objective)
    tensors = state.tensors(root, optimization.build(recipe.optimizer, root), None)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in tensors.values():  # moments of zeros would be a special case
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.copy_(torch.randn(local.shape, generator=generator, device=device))
    return tensors


def _timed(act: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _ratio(own: list[float], other: list[float]) -> dict[str, Any]:
    """Median and range of the ratio within a repetition."""
    ratios = [one / two for one, two in zip(own, other, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)]}


def _check_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    wrong = [name for name, tensor in expected.items() if not _equal(found[name], tensor)]
    assert not wrong, f"{what} gave back other numbers for {wrong[:3]}"


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(
        one.to_local() if isinstance(one, DTensor) else one, other.to_local() if isinstance(other, DTensor) else other
    )


def _flipped(
    directory: Path, load: Callable[[], Any], target: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, int]:
    """Flips one bit at FLIPS evenly spaced places of the largest file, one at a time; how many loads said so, and how many gave wrong numbers."""
    file = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    size, found = file.stat().st_size, {"refused": 0, "loaded_wrong_numbers": 0, "loaded_right_numbers": 0}
    for number in range(FLIPS):
        offset = (2 * number + 1) * size // (2 * FLIPS)
        _flip(file, offset)
        try:
            load()
        except Exception:  # whatever it is, it is no silent acceptance
            found["refused"] += 1
        else:
            is_right = all(_equal(target[name], tensor) for name, tensor in expected.items())
            found["loaded_right_numbers" if is_right else "loaded_wrong_numbers"] += 1
        _flip(file, offset)
    return found


def _flip(file: Path, offset: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        [byte] = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 16]))
