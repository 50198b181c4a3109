"""A run that is killed: real processes of one group, one of which sends itself SIGKILL inside a given moment of the
run.

Nothing of this is in the package: the moments are functions of it, wrapped here, in the process that is to die.
"""

import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from helpers.processes import run_ranks

MOMENTS = ("step", "staging", "write", "merge", "manifest", "report")
OF_RANK_0 = ("merge", "manifest")


@dataclass(frozen=True)
class Death:
    """When a process kills itself."""

    moment: str
    number: int
    """The so many-th time that the run comes to the moment, counted from 1."""
    share: float
    """Of the time that the moment took before: 0 at its beginning, 1 at its end."""
    rank: int
    marker: str
    """A file that is written just before, so that a test can tell this death from others."""
    signal: int = signal.SIGKILL


def group(recipe, run_dir, num_ranks, *, death=None, watch=None, timeout=120, **options):
    """Run `fit` on `num_ranks` ranks; return their exit codes (0: finished, 75: stopped, 1: any error, -9: killed).

    A rank that fails writes its error to `<run_dir>.error<rank>`.
    """
    return run_ranks(_fit, num_ranks, recipe, str(run_dir), death, watch, options, timeout=timeout)


def _fit(rank, recipe, run_dir, death, watch, options):
    from dlm_ray.config.errors import Stopped
    from dlm_ray.training import loop

    def report(metrics, directory):
        """Stands where Ray Train's report does."""

    if death is not None and rank == death.rank:
        report = _arm(death, report)
    if watch is not None:
        _watch(watch, rank)
    try:
        loop.fit(recipe, run_dir, report=report, **options)
    except Stopped:
        return 75
    except BaseException as error:
        Path(f"{run_dir}.error{rank}").write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _arm(death, report):
    from dlm_ray.checkpoint import commit, staging
    from dlm_ray.training import loop

    places = {
        "step": (loop, "train_step"),
        "staging": (staging.Staging, "fill"),
        "write": (commit, "_write_blocks"),
        "merge": (commit, "_merge"),
        "manifest": (commit, "_write_manifest"),
    }
    if death.moment == "report":
        return _deadly(death, report)
    owner, name = places[death.moment]
    setattr(owner, name, _deadly(death, getattr(owner, name)))
    return report


def _deadly(death, original):
    """The same function, within whose so many-th call this process dies."""
    calls = {"number": 0, "seconds": 0.0}

    def die():
        Path(death.marker).write_text(death.moment)
        os.kill(os.getpid(), death.signal)

    def wrapped(*arguments, **named):
        calls["number"] += 1
        if calls["number"] == death.number:
            if death.share == 0:
                die()
            timer = threading.Timer(death.share * calls["seconds"], die)
            timer.start()
        started = time.perf_counter()
        result = original(*arguments, **named)
        calls["seconds"] = time.perf_counter() - started
        if calls["number"] == death.number:
            die()  # still inside: the caller has not been told
        return result

    return wrapped


def _watch(path, rank):
    """Writes down the rows and masks of every step as hashes, a line a step and rank."""
    import hashlib

    import torch

    from dlm_ray.training import loop

    original = loop.micro_batches

    def watched(recipe, objective, rows, step, rank, world_size, device):
        batches = original(recipe, objective, rows, step, rank, world_size, device)
        masks = torch.cat([batch.draw.is_masked for batch in batches])[: len(rows)]
        hashes = [
            hashlib.sha256(row.input_ids.tobytes() + row.document_ids.tobytes() + mask.numpy().tobytes()).hexdigest()
            for row, mask in zip(rows, masks, strict=True)
        ]
        rows_only = [hashlib.sha256(row.input_ids.tobytes() + row.document_ids.tobytes()).hexdigest() for row in rows]
        with open(f"{path}.{rank}", "a") as file:
            file.write(json.dumps({"step": step, "world_size": world_size, "rows": rows_only, "masks": hashes}) + "\n")
        return batches

    loop.micro_batches = watched


def seeded(number, num_steps, num_saves, marker):
    """Death number `number` of a suite: the moments take turns; when within them, and who, is drawn."""
    random_ = random.Random(number)
    moment = MOMENTS[number % len(MOMENTS)]
    num_ranks = 1 + number // len(MOMENTS) % 2
    times = num_steps if moment == "step" else num_saves
    return num_ranks, Death(
        moment=moment,
        number=random_.randrange(2, times + 1),
        share=random_.choice([0.0, random_.random(), 1.0]),
        rank=0 if moment in OF_RANK_0 else random_.randrange(num_ranks),
        marker=str(marker),
    )
