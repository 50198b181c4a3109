"""The commit: every rank writes its blocks into its own database, rank 0 merges them, and `manifest.json` comes last.

A directory without a manifest is not a checkpoint, so an interrupted save leaves nothing that is taken for one. Ranks
write blocks that tile each tensor along its chunks, which is checked before the merge. A reader takes the region that
it needs, independent of the number of ranks that wrote it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
from collections.abc import Coroutine, Mapping
from pathlib import Path

import tensorstore as ts
import torch
import torch.distributed as dist
from torch import Tensor

from dlm_ray.checkpoint import agreement, arrays, files
from dlm_ray.checkpoint.arrays import Spec
from dlm_ray.checkpoint.layout import Block, Region, block_of, check_tiling
from dlm_ray.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    ArrayEntry,
    Manifest,
    digest_of,
    read_key,
    read_manifest,
    serialize,
)
from dlm_ray.config.errors import DamageError, UserError

# The number of tensors copied to the host at once; their buffers are the additional memory of a save.
_TENSORS_AT_ONCE = 32


def save(
    directory: str,
    tensors: Mapping[str, Tensor],
    manifest_fields: Mapping[str, object],
    *,
    group: dist.ProcessGroup | None = None,
) -> Manifest:
    """Commit `tensors` under their names to `directory`. Collective, if torch.distributed is initialized.

    Args:
        directory: the directory of this step. Remains of an interrupted save are removed first; other content is
            refused.
        tensors: DTensors, or tensors that are equal on every rank (rank 0 writes those); on any device.
        manifest_fields: step, recipe, tokenizer, model, capabilities, cursor, extra.
        group: a gloo group for the messages of the ranks; the default group if None.

    Raises:
        UserError: if the directory holds a checkpoint or other files, or the storage does not answer.
        DamageError: if the disk is full; on all ranks, with nothing committed.
    """
    return save_blocks(
        directory, {name: block_of(tensor) for name, tensor in tensors.items()}, manifest_fields, group=group
    )


def save_blocks(
    directory: str,
    blocks: Mapping[str, Block],
    manifest_fields: Mapping[str, object],
    *,
    group: dist.ProcessGroup | None = None,
) -> Manifest:
    """Commit blocks that do not change until the return; a separate thread needs its own group."""
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    base = arrays.key_value_store(directory)
    agreement.gathered(lambda: _prepare(directory, base, blocks) if rank == 0 else None, group)

    def write() -> dict[str, Region]:
        local = {name: block for name, block in blocks.items() if block.writes}
        _write_blocks(directory, arrays.below(base, f"ocdbt.process_{rank}"), local)
        return {name: (block.offset, tuple(block.local.shape)) for name, block in local.items()}

    regions = agreement.gathered(write, group)

    def finish() -> Manifest | None:
        if rank != 0:
            return None
        check_tiling(
            {name: block.shape for name, block in blocks.items()},
            {name: block.chunk for name, block in blocks.items()},
            regions,
        )
        _merge(directory, base, world_size, blocks)
        return _write_manifest(directory, base, manifest_fields, blocks)

    manifest = agreement.gathered(finish, group)[0]
    assert isinstance(manifest, Manifest), "rank 0 writes the manifest"
    return manifest


def load(directory: str, tensors: Mapping[str, Tensor]) -> Manifest:
    """Fill `tensors` in place; each rank reads only the region of its own block. Floating types are converted.

    Raises:
        DamageError: if a name is missing, a shape differs, or a chunk is damaged; the error names tensor and cause.
    """
    manifest = _checked_manifest(directory)
    _fill(directory, manifest, tensors)
    return manifest


def copy(source: str, target: str, recipe: Mapping[str, object]) -> None:
    """Commit a copy of `source` at `target`, with optimizer and cursor, as a checkpoint of another recipe's run.

    A member of a population continues in this way from the state of a better one; the manifest records the source in
    extra.copied_from. Both are on a local disk. The copy is written to `<target>.partial` and renamed after its
    manifest is written, so that `target` is complete or absent.

    Raises:
        UserError: if `target` exists and is not an empty directory, or `<target>.partial` contains foreign files.
        DamageError: if a file of `source` is damaged, or the disk is full.
    """
    assert "://" not in source + target, "a checkpoint is copied on a local disk"
    manifest = _checked_manifest(source)
    path, partial = Path(target), Path(f"{target.rstrip('/')}.partial")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        reason = "already holds a checkpoint" if (path / MANIFEST).is_file() else "exists, and is not a checkpoint"
        raise UserError(f"{target} {reason}; it is not overwritten: move it away, or copy to another directory")
    files.check_own(str(partial))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # remains of an interrupted copy
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(MANIFEST), copy_function=_copy_to_disk)
        fields = manifest.model_dump(mode="json", exclude={"sha256"})
        extra = {**fields["extra"], "copied_from": source}
        _commit(str(partial), arrays.key_value_store(str(partial)), {**fields, "recipe": dict(recipe), "extra": extra})
        partial.rename(path)
    except OSError as error:
        raise arrays.as_storage_error(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_to_disk(source: str, target: str) -> None:
    """Copy a file and wait until it is on the disk, because a manifest implies that all files are."""
    shutil.copyfile(source, target)
    with open(target, "rb") as copied:
        os.fsync(copied.fileno())


def read_tensor(directory: str, name: str) -> Tensor:
    """Return one whole tensor, without a process group."""
    manifest = _checked_manifest(directory)
    if name not in manifest.arrays:
        raise DamageError(f"{directory} has no {name}")
    return _whole(directory, manifest, name)


def verify(directory: str) -> list[str]:
    """Read every chunk of every array, and return one line per defect; empty if the whole checkpoint is valid."""
    findings = []
    try:
        manifest = read_manifest(directory)
    except DamageError as error:
        return [str(error)]
    findings += files.broken(directory, manifest.files)
    for name in manifest.arrays:
        try:
            _whole(directory, manifest, name)
        except DamageError as error:
            findings.append(str(error))
    return findings


def _checked_manifest(directory: str) -> Manifest:
    manifest = read_manifest(directory)
    if findings := files.broken(directory, manifest.files):
        raise DamageError(f"{directory} is damaged: {findings[0]}")
    return manifest


def _whole(directory: str, manifest: Manifest, name: str) -> Tensor:
    entry = manifest.arrays[name]
    tensor = torch.empty(entry.shape, dtype=arrays.TORCH_DTYPES[entry.dtype])
    _fill(directory, manifest, {name: tensor})
    return tensor


def _fill(directory: str, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Read this rank's block of every tensor, after a check that all of them fit."""
    missing = sorted(set(tensors) - set(manifest.arrays))
    if missing:
        raise DamageError(f"{directory} has no {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}")
    blocks = {name: block_of(tensor) for name, tensor in tensors.items()}
    for name, block in blocks.items():
        _check_fit(directory, name, block, manifest.arrays[name])
    base, is_remote = arrays.key_value_store(directory), "://" in directory
    shared = arrays.context(one_at_a_time=not is_remote)
    budget = arrays.Budget(arrays.REMOTE_READ_BYTES if is_remote else arrays.LOCAL_READ_BYTES)

    async def fill(name: str, block: Block) -> None:
        entry = manifest.arrays[name]
        spec = arrays.open_spec(arrays.database(base, name))
        await arrays.read_region(
            spec, block.local.detach(), block.offset, arrays.TORCH_DTYPES[entry.dtype], entry.chunk, budget, shared
        )

    try:
        _run({name: fill(name, block) for name, block in blocks.items()}, directory)
    except DamageError as error:
        raise files.located(directory, error) from error


def _check_fit(directory: str, name: str, block: Block, entry: ArrayEntry) -> None:
    if block.shape != entry.shape:
        raise DamageError(f"{directory}: {name} has shape {list(entry.shape)}, but {list(block.shape)} is needed")
    stored, needed = arrays.TORCH_DTYPES[entry.dtype], block.local.dtype
    if stored != needed and not (stored.is_floating_point and needed.is_floating_point):
        raise DamageError(f"{directory}: {name} is stored as {entry.dtype}, but {needed} is needed")


def _write_blocks(directory: str, store: Spec, blocks: Mapping[str, Block]) -> None:
    """Write this rank's blocks into its own database; blocks on an accelerator are copied a few at a time."""
    shared, limit = arrays.context(), asyncio.Semaphore(_TENSORS_AT_ONCE)

    async def write(name: str, block: Block) -> None:
        assert block.local.dtype in arrays.DTYPES, (
            f"{name} is {block.local.dtype}, and a checkpoint holds {', '.join(arrays.TORCH_DTYPES)}"
        )
        spec = arrays.create_spec(arrays.database(store, name), block.shape, block.chunk, block.local.dtype)
        local = block.local.detach()
        # All blocks of the host at once make fewer and larger commits of the database.
        if local.device.type == "cpu" and local.is_contiguous():
            await arrays.write_region(spec, local, block.offset, shared)
        else:
            async with limit:
                await arrays.write_region(spec, local.cpu().contiguous(), block.offset, shared)

    _run({name: write(name, block) for name, block in blocks.items()}, directory)


def _run(jobs: Mapping[str, Coroutine[None, None, None]], directory: str) -> None:
    """Await all jobs, then raise the first failure with its tensor's name; no write continues after the return."""

    async def all_of_them() -> list[BaseException | None]:
        return await asyncio.gather(*jobs.values(), return_exceptions=True)

    for name, result in zip(jobs, arrays.wait(all_of_them()), strict=True):
        if isinstance(result, UserError):
            raise result
        if isinstance(result, ValueError):
            raise arrays.as_user_error(result, f"{directory}: {name}") from result
        if isinstance(result, BaseException):
            raise result


def _prepare(directory: str, base: Spec, blocks: Mapping[str, Block]) -> None:
    """Refuse a directory with a checkpoint, remove remains of a failed save, and check the storage and its room."""
    if read_key(base, MANIFEST, directory) is not None:
        raise UserError(f"{directory} already holds a checkpoint; it is not overwritten")
    files.check_own(directory)
    try:
        store = ts.KvStore.open(base).result()
        store.write("probe", b"").result(timeout=arrays.ANSWER_SECONDS)
        store.delete_range(ts.KvStore.KeyRange()).result()
    except (ValueError, TimeoutError) as error:
        raise arrays.as_storage_error(error, directory) from error
    if "://" not in directory:
        needed = sum(math.prod(block.shape) * block.local.element_size() for block in blocks.values())
        arrays.check_room(directory, needed)


def _merge(directory: str, base: Spec, world_size: int, blocks: Mapping[str, Block]) -> None:
    """Merge the databases of all ranks, whose data files stay in place, and check that every chunk is listed."""

    async def merge() -> set[str]:
        shared = arrays.context()
        parent = await ts.KvStore.open(arrays.database(base), context=shared)
        transaction = ts.Transaction(atomic=True)
        for rank in range(world_size):
            child = await ts.KvStore.open(arrays.database(arrays.below(base, f"ocdbt.process_{rank}")), context=shared)
            await child.experimental_copy_range_to(parent.with_transaction(transaction))
        await transaction.commit_async()
        return {key.decode() for key in await parent.list()}

    try:
        listed = arrays.wait(merge())
    except ValueError as error:
        raise arrays.as_user_error(error, directory) from error
    expected: set[str] = set().union(*(arrays.keys(name, block.shape, block.chunk) for name, block in blocks.items()))
    assert listed == expected, (
        f"{directory}: the merged database differs from what was saved in {sorted(listed ^ expected)[:5]}"
    )


def _write_manifest(directory: str, base: Spec, fields: Mapping[str, object], blocks: Mapping[str, Block]) -> Manifest:
    entries = {
        name: {"shape": list(block.shape), "dtype": arrays.DTYPES[block.local.dtype], "chunk": list(block.chunk)}
        for name, block in blocks.items()
    }
    digests = {name: digest.model_dump() for name, digest in files.digest_files(directory).items()}
    return _commit(directory, base, {**fields, "format": FORMAT, "arrays": entries, "files": digests})


def _commit(directory: str, base: Spec, fields: Mapping[str, object]) -> Manifest:
    content = json.loads(json.dumps({**fields, "sha256": ""}))  # as a reader will see it: without tuples
    content["sha256"] = digest_of(content)
    manifest = Manifest.model_validate(content)
    try:
        store = ts.KvStore.open(base).result()
        absent = store.read(MANIFEST).result().stamp.generation
        stamp = store.write(MANIFEST, serialize(content), if_equal=absent).result()
    except ValueError as error:
        raise arrays.as_user_error(error, f"{directory}/{MANIFEST}") from error
    assert stamp.generation != b"", f"another writer has committed {directory} at the same time"
    return manifest
