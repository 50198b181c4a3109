"""The steps of a run directory: which are committed, which is the last, and which are removed. Local, s3:// and gs://."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import tensorstore as ts

from dlm_ray.checkpoint import arrays
from dlm_ray.checkpoint.commit import MANIFEST

_STEP = re.compile(r"step_(\d{8})")


def step_directory(run_dir: str, step: int) -> str:
    """Where the checkpoint of `step` lies."""
    return f"{run_dir.rstrip('/')}/step_{step:08d}"


def is_committed(path: str) -> bool:
    """Whether `path` is a checkpoint directory with a manifest.

    Raises:
        UserError: if a remote storage does not answer.
    """
    if "://" not in path:
        return (Path(path) / MANIFEST).is_file()
    return MANIFEST in _remote_keys(path, MANIFEST)


def committed_steps(run_dir: str) -> list[int]:
    """Steps with a manifest, in order.

    Raises:
        UserError: if a remote storage does not answer.
    """
    return [step for step, has_manifest in _steps(run_dir).items() if has_manifest]


def latest(run_dir: str) -> str | None:
    """The directory of the last committed step, if there is one."""
    steps = committed_steps(run_dir)
    return step_directory(run_dir, steps[-1]) if steps else None


def prune(run_dir: str, keep_last: int) -> list[int]:
    """Removes every step before the last `keep_last` committed ones, also what half a save or half a removal left of it.

    Each manifest goes first, so that half a removal leaves nothing that is believed.

    Returns:
        The steps that were removed.
    """
    assert keep_last >= 1, "the last checkpoint is never pruned"
    kept = committed_steps(run_dir)[-keep_last:]
    removed = [step for step in _steps(run_dir) if kept and step < kept[0]]
    for step in removed:
        _remove(step_directory(run_dir, step))
    return removed


def _steps(run_dir: str) -> dict[int, bool]:
    """Whether it has a manifest, of every step that there is something of, in order."""
    if "://" in run_dir:
        keys = _remote_keys(run_dir, "step_")
    else:
        keys = [f"{path.name}/{MANIFEST if is_committed(str(path)) else ''}" for path in Path(run_dir).glob("step_*")]
    steps: dict[int, bool] = {}
    for key in keys:
        name, _, rest = key.partition("/")
        if match := _STEP.fullmatch(name):
            steps[int(match[1])] = steps.get(int(match[1]), False) or rest == MANIFEST
    return dict(sorted(steps.items()))


def _remove(directory: str) -> None:
    store = ts.KvStore.open(arrays.key_value_store(directory)).result()
    store.write(MANIFEST, None).result()
    if "://" in directory:
        store.delete_range(ts.KvStore.KeyRange()).result()
    else:
        shutil.rmtree(directory)


def _remote_keys(path: str, prefix: str) -> list[str]:
    """The keys in a directory that begin with `prefix`."""
    try:
        store = ts.KvStore.open(arrays.key_value_store(path)).result()
        keys = store.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))).result(timeout=arrays.ANSWER_SECONDS)
    except (ValueError, TimeoutError) as error:
        raise arrays.refusal(error, path) from error
    return [key.decode() for key in keys]
