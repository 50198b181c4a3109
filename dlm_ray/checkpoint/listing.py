"""The checkpoints of a run directory (local, s3:// or gs://): listing, the last one, and removal of old ones."""

from __future__ import annotations

import logging
import math
import re
import shutil
from pathlib import Path

import tensorstore as ts

from dlm_ray.checkpoint import arrays, files
from dlm_ray.checkpoint.manifest import MANIFEST, read_manifest
from dlm_ray.config.errors import DamageError
from dlm_ray.config.paths import check_url

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d{8}|[1-9]\d{8,})")  # the format of `step_directory`


def step_directory(run_dir: str, step: int) -> str:
    """Return the directory of the checkpoint of `step`."""
    return f"{run_dir.rstrip('/')}/step_{step:08d}"


def is_committed(path: str) -> bool:
    """Return whether `path` is a checkpoint directory with a manifest.

    Raises:
        UserError: if a remote storage does not answer.
    """
    if "://" not in path:
        return (Path(path) / MANIFEST).is_file()
    return MANIFEST in _remote_keys(path, MANIFEST)


def committed_steps(run_dir: str) -> list[int]:
    """Return the steps with a manifest, in order.

    Raises:
        UserError: if a remote storage does not answer.
    """
    return [step for step, has_manifest in _steps(run_dir).items() if has_manifest]


def latest(run_dir: str) -> str | None:
    """Return the directory of the last committed step, if any."""
    steps = committed_steps(run_dir)
    return step_directory(run_dir, steps[-1]) if steps else None


def prune(run_dir: str, keep_last: int, *, keep_best: int = 0, keep_every_steps: int = 0) -> list[int]:
    """Remove every step before the last `keep_last` committed ones, also remains of interrupted saves.

    Each manifest is removed first, so that an interrupted removal leaves no valid checkpoint. A directory without a
    manifest stays if it contains anything that no save writes.

    Args:
        run_dir: the run directory.
        keep_last: number of the last committed steps to keep.
        keep_best: number of steps with the fewest held-out nats per token to keep.
        keep_every_steps: keep committed steps that are multiples of it; 0 for none.

    Returns:
        The steps that were removed.
    """
    assert keep_last >= 1, "the last checkpoint is never pruned"
    committed = committed_steps(run_dir)
    last = committed[-keep_last:]
    kept = set(last) | set(_best(run_dir, committed, keep_best))
    kept |= {step for step in committed if keep_every_steps and step % keep_every_steps == 0}
    removed = []
    for step in [step for step in _steps(run_dir) if last and step < last[0] and step not in kept]:
        directory = step_directory(run_dir, step)
        if step not in committed and (names := files.foreign(directory)):
            log.warning("%s is not pruned: it is not a checkpoint, and contains %s", directory, ", ".join(names[:3]))
            continue
        remove(directory)
        removed.append(step)
    return removed


def _best(run_dir: str, steps: list[int], count: int) -> list[int]:
    """Return the `count` steps with the least nats per token, or block cross-entropy, measured at the step."""
    ranked = []
    for step in steps if count else []:
        try:
            metrics = read_manifest(step_directory(run_dir, step)).extra.get("metrics", {})
        except DamageError:
            continue  # a damaged checkpoint is not among the best
        if metrics.get("validated_step") != step:
            continue  # the validation belongs to another state
        validation = metrics["validation"]
        nats = validation.get("nats_per_token", validation.get("block_nll"))
        if nats is not None and math.isfinite(nats):  # NaN cannot be sorted
            ranked.append((nats, step))
    return [step for _, step in sorted(ranked)[:count]]


def _steps(run_dir: str) -> dict[int, bool]:
    """Return whether each step has a manifest, for every step with any file, in order."""
    if "://" in check_url(run_dir, "path"):
        keys = _remote_keys(run_dir, "step_")
    else:
        keys = [f"{path.name}/{MANIFEST if is_committed(str(path)) else ''}" for path in Path(run_dir).glob("step_*")]
    steps: dict[int, bool] = {}
    for key in keys:
        name, _, rest = key.partition("/")
        if match := _STEP.fullmatch(name):
            steps[int(match[1])] = steps.get(int(match[1]), False) or rest == MANIFEST
    return dict(sorted(steps.items()))


def remove(directory: str) -> None:
    """Remove a step; its manifest goes first.

    Raises:
        UserError: if the directory has no manifest, and contains something that no save writes.
    """
    if not is_committed(directory):
        files.check_own(directory)
    store = ts.KvStore.open(arrays.key_value_store(directory)).result()
    store.write(MANIFEST, None).result()
    if "://" in directory:
        store.delete_range(ts.KvStore.KeyRange()).result()
    else:
        shutil.rmtree(directory)


def _remote_keys(path: str, prefix: str) -> list[str]:
    """Return the keys in a directory that begin with `prefix`."""
    try:
        store = ts.KvStore.open(arrays.key_value_store(path)).result()
        keys = store.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))).result(
            timeout=arrays.ANSWER_SECONDS
        )
    except (ValueError, TimeoutError) as error:
        raise arrays.as_storage_error(error, path) from error
    return [key.decode() for key in keys]
