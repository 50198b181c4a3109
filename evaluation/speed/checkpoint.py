"""The cost of checkpoints relative to torch.distributed.checkpoint, and what each does with a flipped bit.

The state is the network of a shape with AdamW's moments, sharded by FSDP2 over this one process. Both writers save it
to the same disk in turn.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from dlm_ray.evaluation.speed.networks import Shape, build_root, network_of, single_process_group, training_recipe
from dlm_ray.evaluation.speed.timing import interleaved, paired_ratios, rounded_medians, timed
from torch import Tensor
from torch.distributed.tensor import DTensor

from dlm_ray.checkpoint import commit
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.recipe import Checkpoint
from dlm_ray.training import optimizer as optimization
from dlm_ray.training import setup, state
from dlm_ray.training.saving import Saver

Tensors = Mapping[str, Tensor]

MANIFEST_FIELDS: JsonObject = {
    "recipe": {},
    "tokenizer": {},
    "model": {},
    "capabilities": {},
    "cursor": {},
    "extra": {"metrics": {}},
}
NUM_FLIPS = 8


def measure(shape: Shape, repetitions: int, folder: Path | None, device: torch.device) -> JsonObject:
    """Return the seconds of saving and loading, their ratios within a round, and the outcome of flipped bits.

    Args:
        shape: the network.
        repetitions: rounds after the warm-up, which allocates the buffers of the asynchronous save.
        folder: a folder on the disk to measure; the system's temporary folder if None.
        device: where the tensors lie.
    """
    with single_process_group(device), tempfile.TemporaryDirectory(dir=folder) as place:
        return _measure(_training_state(shape, device), Path(place), repetitions, device)


def _measure(tensors: dict[str, Tensor], place: Path, repetitions: int, device: torch.device) -> JsonObject:
    saver = Saver(Checkpoint(), place / "asynchronous", rank=0)
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    ours, theirs = place / "ours", place / "dcp"

    def load_ours() -> None:
        commit.load(str(ours), target)

    def load_theirs() -> None:
        dcp.load(target, storage_reader=dcp.FileSystemReader(theirs))

    def save(write: Callable[[], object], path: Path) -> float:
        shutil.rmtree(path, ignore_errors=True)
        return timed(write, device, wait=False)

    def load(read: Callable[[], None]) -> float:
        elapsed = timed(read, device, wait=False)
        different = _different(target, tensors)
        assert not different, f"loading gave other numbers for {different[:3]}"
        return elapsed

    def begin(number: int) -> float:
        fields = {**MANIFEST_FIELDS, "step": number + 1}
        return timed(lambda: saver.begin(number + 1, tensors, fields, {}), device, wait=False)

    fields = {**MANIFEST_FIELDS, "step": 1}
    cases: dict[str, Callable[[int], float]] = {
        "save": lambda _: save(lambda: commit.save(str(ours), tensors, fields), ours),
        "dcp_save": lambda _: save(lambda: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(theirs)), theirs),
        "blocked_by_asynchronous_save": begin,
        "rest_of_asynchronous_save": lambda _: timed(lambda: saver.end(must_succeed=True), device, wait=False),
        "load": lambda _: load(load_ours),
        "dcp_load": lambda _: load(load_theirs),
    }
    seconds = interleaved(cases, repetitions)
    saver.close()
    return {
        "state_mib": round(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20),
        "num_tensors": len(tensors),
        "repetitions": repetitions,
        "median_seconds": rounded_medians(seconds, 3),
        "save_over_dcp": _ratio(seconds["save"], seconds["dcp_save"]),
        "load_over_dcp": _ratio(seconds["load"], seconds["dcp_load"]),
        "blocked_over_synchronous_save": _ratio(seconds["blocked_by_asynchronous_save"], seconds["save"]),
        "flipped_bits": {
            "ours": _load_flipped(ours, load_ours, target, tensors),
            "torch.distributed.checkpoint": _load_flipped(theirs, load_theirs, target, tensors),
        },
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    }


def _training_state(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a training run's checkpoint, filled with random numbers."""
    recipe = training_recipe(shape, "autoregressive")
    network = network_of(recipe, shape.vocab_size)
    root = build_root(recipe, network, setup.build_objective(recipe, network, shape.sequence_length), device)
    tensors = state.tensors(root, optimization.build(recipe.optimizer, root), None)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in tensors.values():  # moments of zeros would compress and compare too well
        local = _local(tensor)
        local.copy_(torch.randn(local.shape, generator=generator, device=device))
    return tensors


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> JsonObject:
    """Return the median and the range of the ratio within a round."""
    ratios = paired_ratios(numerators, denominators)
    return {"median": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)]}


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _different(loaded: Tensors, expected: Tensors) -> list[str]:
    """Return the names of the tensors whose numbers differ."""
    return [name for name, tensor in expected.items() if not torch.equal(_local(loaded[name]), _local(tensor))]


def _load_flipped(directory: Path, load: Callable[[], None], target: Tensors, expected: Tensors) -> dict[str, int]:
    """Flip one bit at a time, at NUM_FLIPS even places of the largest file, and count the outcomes of loading it."""
    file = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    size, outcomes = file.stat().st_size, {"refused": 0, "loaded_wrong_numbers": 0, "loaded_right_numbers": 0}
    for number in range(NUM_FLIPS):
        offset = (2 * number + 1) * size // (2 * NUM_FLIPS)
        _flip_bit(file, offset)
        try:
            load()
        except Exception:  # any error is a refusal
            outcomes["refused"] += 1
        else:
            is_wrong = bool(_different(target, expected))
            outcomes["loaded_wrong_numbers" if is_wrong else "loaded_right_numbers"] += 1
        _flip_bit(file, offset)
    return outcomes


def _flip_bit(file: Path, offset: int) -> None:
    """Flip one bit of the byte at `offset`; a second call restores it."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        [byte] = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 16]))
