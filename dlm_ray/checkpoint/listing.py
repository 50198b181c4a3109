"""The steps of a run directory: which are committed, which is the last, and which are removed. Local, s3:// and gs://."""

from __future__ import annotations

import re
from pathlib import Path

import tensorstore as ts

from dlm_ray.checkpoint import arrays
from dlm_ray.checkpoint.commit import MANIFEST

_STEP = re.compile(r"step_(\d{8})")


def step_directory(run_dir: str, step: int) -> str:
    """Where the checkpoint of `step` lies."""
    return f"{run_dir.rstrip('/')}/step_{step:08d}"


def is_committed(path: str) -> bool:
    """Whether `path` is a checkpoint directory with a manifest."""
    if "://" not in path:
        return (Path(path) / MANIFEST).is_file()
    found = ts.KvStore.open(arrays.key_value_store(path)).result().read(MANIFEST).result(timeout=30)
    return bool(found.state == "value")


def committed_steps(run_dir: str) -> list[int]:
    """Steps with a manifest, in order."""
    steps = set()
    for key in _keys(run_dir, "step_"):
        name, _, rest = key.partition("/")
        if rest == MANIFEST and (match := _STEP.fullmatch(name)):
            steps.add(int(match[1]))
    return sorted(steps)


def latest(run_dir: str) -> str | None:
    """The directory of the last committed step, if there is one."""
    steps = committed_steps(run_dir)
    return step_directory(run_dir, steps[-1]) if steps else None


def prune(run_dir: str, keep_last: int) -> list[int]:
    """Removes all committed steps but the last `keep_last`, each manifest first, so that half a removal leaves nothing that is believed.

    Returns:
        The steps that were removed.
    """
    assert keep_last >= 1, "the last checkpoint is never pruned"
    removed = committed_steps(run_dir)[:-keep_last]
    for step in removed:
        store = ts.KvStore.open(arrays.key_value_store(step_directory(run_dir, step))).result()
        store.delete_range(ts.KvStore.KeyRange(MANIFEST, MANIFEST + "\0")).result()
        store.delete_range(ts.KvStore.KeyRange()).result()
    return removed


def _keys(path: str, prefix: str) -> list[str]:
    if "://" not in path:
        return [f"{one.parent.name}/{one.name}" for one in Path(path).glob(f"{prefix}*/{MANIFEST}")]
    store = ts.KvStore.open(arrays.key_value_store(path)).result()
    return [key.decode() for key in store.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))).result(timeout=30)]
