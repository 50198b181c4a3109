"""The contents of a run directory: its metrics and the tensors of its checkpoints."""

import json
from pathlib import Path

import torch

from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.arrays import TORCH_DTYPES


def metrics(run_dir):
    """Return the events of `metrics.jsonl`, without a last line that is still being written."""
    path = Path(run_dir, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run_dir):
    """Return the training loss by step."""
    return {event["step"]: event["loss"] for event in metrics(run_dir) if "loss" in event}


def tensors(run_dir):
    """Return all tensors of the last checkpoint by name."""
    return checkpoint_tensors(listing.latest(str(run_dir)))


def checkpoint_tensors(directory):
    """Return all tensors of one checkpoint by name."""
    arrays = commit.read_manifest(directory).arrays
    tensors = {name: torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype]) for name, entry in arrays.items()}
    commit.load(directory, tensors)
    return tensors


def assert_same_tensors(one, other):
    """Assert that the last checkpoints of two runs are equal bit for bit."""
    assert_equal_tensors(tensors(one), tensors(other))


def assert_equal_tensors(expected, found):
    """Assert that two dictionaries hold the same names and bits."""
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{', '.join(different)} differ"


def assert_same_run(one, other):
    """Assert that two runs logged the same losses and ended with the same bits."""
    assert losses(one) == losses(other)
    assert_same_tensors(one, other)
