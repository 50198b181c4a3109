"""Measure speed on this machine, as ratios to a baseline within one run, and print them as JSON.

Command: python -m dlm_ray.evaluation.speed {train,objectives,sample,serving,checkpoint} ... --shape NAME [--out DIR]

`train` and `objectives` time training steps (`training.py`), `sample` block sampling over a KV cache (`sampling.py`),
`serving` the engine and the HTTP service (`serving.py`), `checkpoint` saving and loading (`checkpoint.py`). Cases are
interleaved, so that other work on the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch
from dlm_ray.evaluation.speed import checkpoint, sampling, serving, training
from dlm_ray.evaluation.speed.networks import SHAPES
from dlm_ray.evaluation.speed.timing import pick_device

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.paths import folder_argument

REPETITIONS = 7
_TITLES = {"sample": "sampling", "serving": "serving", "checkpoint": "saving and loading"}


def measure(what: str, shape_name: str, repetitions: int, seconds: float, folder: Path | None) -> JsonObject:
    """Run one measurement and return its numbers with the machine, the date and the command.

    Args:
        what: a key of `training.COMPARED`, `sample`, `serving` or `checkpoint`.
        shape_name: a key of SHAPES.
        repetitions: rounds after the warm-up.
        seconds: for `serving`, how long clients send new requests.
        folder: for `checkpoint`, a folder on the disk to measure; the system's temporary folder if None.
    """
    # The serving replica has one thread; the clients and the HTTP ingress need the other cores.
    torch.set_num_threads(1 if what == "serving" else os.cpu_count() or 1)
    shape, device = SHAPES[shape_name], pick_device()
    result = _environment(what, shape_name, device)
    if what == "sample":
        return result | sampling.measure(shape.architecture, shape.vocab_size, repetitions, device)
    if what == "serving":
        return result | serving.measure(shape.architecture, shape.vocab_size, repetitions, seconds)
    if what == "checkpoint":
        result["tensorstore"] = importlib.metadata.version("tensorstore")
        return result | checkpoint.measure(shape, repetitions, folder, device)
    return result | training.measure(what, shape, repetitions, device)


def _environment(what: str, shape_name: str, device: torch.device) -> JsonObject:
    """Return what was measured, where, when, and with which command."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "what": f"{_TITLES.get(what, 'training step')}, shape {shape_name}",
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "command": f"python -m dlm_ray.evaluation.speed {what} --shape {shape_name}",
    }


def main() -> None:
    """Parse the command line, run the measurements, and print or write their numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m dlm_ray.evaluation.speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("what", nargs="+", choices=[*training.COMPARED, "sample", "serving", "checkpoint"])
    parser.add_argument("--shape", choices=list(SHAPES), required=True, help="size of the network and its batch")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="rounds after one that warms up")
    parser.add_argument("--seconds", type=float, default=120.0, help="serving: how long clients send new requests")
    parser.add_argument("--folder", type=folder_argument, help="checkpoint: a folder on the disk to measure")
    parser.add_argument("--out", type=folder_argument, help="folder for speed_<what>_<shape>.json")
    arguments = parser.parse_args()
    for what in arguments.what:
        result = measure(what, arguments.shape, arguments.repetitions, arguments.seconds, arguments.folder)
        text = json.dumps(result, indent=2) + "\n"
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"speed_{what}_{arguments.shape}.json").write_text(text)
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
