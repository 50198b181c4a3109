"""The commit: every rank writes its blocks into a database of its own, rank 0 merges them, and `manifest.json` comes last.

No manifest, no checkpoint: whatever dies before it leaves nothing that is believed later. Ranks write blocks that tile each
tensor on the borders of its chunks, which is proved before the merge; a reader takes the region it needs, whatever number of
ranks wrote it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import shutil
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from dlm_ray.checkpoint import agreement, arrays, files
from dlm_ray.checkpoint.files import FileDigest
from dlm_ray.checkpoint.layout import Block, block_of, check_tiling
from dlm_ray.config.errors import DamageError, UserError

FORMAT = 2
MANIFEST = "manifest.json"
# At most so many tensors are copied to the host at once to be written: their buffers are what saving needs beside the tensors themselves.
_TENSORS_AT_ONCE = 32


class ArrayEntry(BaseModel):
    """One array of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]


class Manifest(BaseModel):
    """What a checkpoint is: written last, and with its own hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    step: int
    recipe: dict[str, Any]
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    capabilities: dict[str, Any]
    cursor: dict[str, Any]
    extra: dict[str, Any]
    arrays: dict[str, ArrayEntry]
    files: dict[str, FileDigest] = {}
    """On a local disk; a checkpoint of format 1 has none."""
    sha256: str


def save(
    directory: str,
    tensors: Mapping[str, Tensor],
    manifest_fields: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> Manifest:
    """Commits `tensors` under their names to `directory`. Collective, if torch.distributed is initialised.

    Args:
        directory: of this step; what an attempt without a manifest left in it is removed first, and anything else is refused.
        tensors: DTensors, or tensors that every rank holds alike (rank 0 writes those); on any device.
        manifest_fields: step, recipe, tokenizer, model, capabilities, cursor, extra.
        group: a gloo group for the ranks' messages; the default group if None.

    Raises:
        UserError: if the directory holds a checkpoint already, or something that is none, or the storage does not answer.
        DamageError: if the disk is full; on all ranks, with nothing committed.
    """
    return save_blocks(
        directory, {name: block_of(tensor) for name, tensor in tensors.items()}, manifest_fields, group=group
    )


def save_blocks(
    directory: str,
    blocks: Mapping[str, Block],
    manifest_fields: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> Manifest:
    """`save` of blocks that nobody changes until it returns; in a thread of its own, it needs a group of its own."""
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    base = arrays.key_value_store(directory)
    agreement.gathered(lambda: _prepare(directory, base, blocks) if rank == 0 else None, group)

    def write() -> dict[str, Any]:
        own = {name: block for name, block in blocks.items() if block.writes}
        _write_blocks(directory, arrays.below(base, f"ocdbt.process_{rank}"), own)
        return {name: (block.offset, tuple(block.local.shape)) for name, block in own.items()}

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
    assert isinstance(manifest, Manifest), "rank 0 has written the manifest"
    return manifest


def read_manifest(directory: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamageError: if there is none, it is damaged, or its format is newer than this version reads.
    """
    content = _read(arrays.key_value_store(directory), MANIFEST, directory)
    if content is None:
        raise DamageError(
            f"{directory} is not a checkpoint: it has no {MANIFEST} (a run that stopped while it saved leaves such a directory)"
        )
    try:
        fields = json.loads(content)
        if fields["format"] > FORMAT:
            raise DamageError(
                f"{directory}/{MANIFEST} has format {fields['format']}, and this version reads up to {FORMAT}; install a newer dlm-ray"
            )
        manifest = Manifest.model_validate(fields)
        found = _digest(fields)
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        if isinstance(error, DamageError):
            raise
        raise DamageError(f"{directory}/{MANIFEST} is damaged: {str(error).splitlines()[0]}") from error
    if found != manifest.sha256:
        raise DamageError(f"{directory}/{MANIFEST} is damaged: its sha256 is {found} and it says {manifest.sha256}")
    if manifest.format > 1 and content != _text(fields):
        raise DamageError(f"{directory}/{MANIFEST} is damaged: it says the same in other bytes")
    return manifest


def load(directory: str, tensors: Mapping[str, Tensor]) -> Manifest:
    """Fills `tensors` in place; each rank reads the region of its own block and no more. Floating types are converted.

    Raises:
        DamageError: if a name is missing, a shape differs, or a chunk is damaged; naming tensor and cause.
    """
    manifest = _manifest_of_whole_files(directory)
    _fill(directory, manifest, tensors)
    return manifest


def copy(source: str, target: str, recipe: Mapping[str, Any]) -> None:
    """Commits at `target` what `source` holds, optimizer and cursor included, as a checkpoint of another recipe's run. On a local disk.

    A member of a population goes on so from a better one's state; the manifest notes whose under extra.copied_from. The copy is made in
    `<target>.partial` and renamed once its manifest is written, so that `target` is whole or not there.

    Raises:
        UserError: if `target` exists (an empty directory may), or something that is not ours lies where the copy is made.
        DamageError: if a file of `source` is damaged, or the disk is full.
    """
    assert "://" not in source + target, "a checkpoint is copied on a local disk"
    manifest = _manifest_of_whole_files(source)
    path, partial = Path(target), Path(f"{target.rstrip('/')}.partial")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "holds a checkpoint already" if (path / MANIFEST).is_file() else "exists, and is no checkpoint"
        raise UserError(f"{target} {what}; it is not overwritten: move it away, or copy to another directory")
    files.check_own(str(partial))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was cut short
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(MANIFEST), copy_function=_copy_to_disk)
        fields = manifest.model_dump(mode="json", exclude={"sha256"})
        extra = {**fields["extra"], "copied_from": source}
        _commit(str(partial), arrays.key_value_store(str(partial)), {**fields, "recipe": dict(recipe), "extra": extra})
        partial.rename(path)
    except OSError as error:
        raise arrays.refusal(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_to_disk(source: str, target: str) -> None:
    """Copies a file, and waits until the disk has it: what the manifest is written behind must be there if the manifest is."""
    shutil.copyfile(source, target)
    with open(target, "rb") as copied:
        os.fsync(copied.fileno())


def read_tensor(directory: str, name: str) -> Tensor:
    """One whole tensor, without a process group."""
    manifest = _manifest_of_whole_files(directory)
    if name not in manifest.arrays:
        raise DamageError(f"{directory} has no {name}")
    return _whole(directory, manifest, name)


def verify(directory: str) -> list[str]:
    """Reads every chunk of every array; what is wrong, one line each. Empty means that the whole checkpoint is good."""
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


def _manifest_of_whole_files(directory: str) -> Manifest:
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
    """Reads this rank's block of every tensor, once all of them are known to fit."""
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
        raise DamageError(f"{directory}: {name} has shape {list(entry.shape)}, and {list(block.shape)} is needed")
    stored, wanted = arrays.TORCH_DTYPES[entry.dtype], block.local.dtype
    if stored != wanted and not (stored.is_floating_point and wanted.is_floating_point):
        raise DamageError(f"{directory}: {name} is stored as {entry.dtype}, and {wanted} is needed")


def _write_blocks(directory: str, own: dict[str, Any], blocks: Mapping[str, Block]) -> None:
    """Writes this rank's blocks into its own database; copies of what is on an accelerator are made a few at a time."""
    shared, limit = arrays.context(), asyncio.Semaphore(_TENSORS_AT_ONCE)

    async def write(name: str, block: Block) -> None:
        assert block.local.dtype in arrays.DTYPES, (
            f"{name} is {block.local.dtype}, and a checkpoint holds {', '.join(arrays.TORCH_DTYPES)}"
        )
        spec = arrays.create_spec(arrays.database(own, name), block.shape, block.chunk, block.local.dtype)
        local = block.local.detach()
        if (
            local.device.type == "cpu" and local.is_contiguous()
        ):  # all of them at once make fewer and larger commits of the database
            await arrays.write_region(spec, local, block.offset, shared)
        else:
            async with limit:
                await arrays.write_region(spec, local.cpu().contiguous(), block.offset, shared)

    _run({name: write(name, block) for name, block in blocks.items()}, directory)


def _run(jobs: Mapping[str, Coroutine[Any, Any, Any]], directory: str) -> None:
    """Awaits all jobs; the first failure is raised with the tensor's name once all have ended, so that no write goes on behind the caller's back."""

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*jobs.values(), return_exceptions=True)

    for name, result in zip(jobs, arrays.wait(all_of_them()), strict=True):
        if isinstance(result, UserError):
            raise result
        if isinstance(result, ValueError):
            raise arrays.explain(result, f"{directory}: {name}") from result
        if isinstance(result, BaseException):
            raise result


def _prepare(directory: str, base: dict[str, Any], blocks: Mapping[str, Block]) -> None:
    """Refuses a directory with a checkpoint, removes what a failed attempt left, and finds out whether the storage answers and has room."""
    if _read(base, MANIFEST, directory) is not None:
        raise UserError(f"{directory} holds a checkpoint already; it is not overwritten")
    files.check_own(directory)
    try:
        store = ts.KvStore.open(base).result()
        store.write("probe", b"").result(timeout=arrays.ANSWER_SECONDS)
        store.delete_range(ts.KvStore.KeyRange()).result()
    except (ValueError, TimeoutError) as error:
        raise arrays.refusal(error, directory) from error
    if "://" not in directory:
        needed = sum(math.prod(block.shape) * block.local.element_size() for block in blocks.values())
        arrays.check_room(directory, needed)


def _merge(directory: str, base: dict[str, Any], world_size: int, blocks: Mapping[str, Block]) -> None:
    """One database over those of all ranks, whose data files stay where they are; every chunk has to be listed in it."""

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
        raise arrays.explain(error, directory) from error
    expected: set[str] = set().union(*(arrays.keys(name, block.shape, block.chunk) for name, block in blocks.items()))
    assert listed == expected, (
        f"{directory}: the merged database differs from what was saved in {sorted(listed ^ expected)[:5]}"
    )


def _write_manifest(
    directory: str, base: dict[str, Any], fields: Mapping[str, Any], blocks: Mapping[str, Block]
) -> Manifest:
    entries = {
        name: {"shape": list(block.shape), "dtype": arrays.DTYPES[block.local.dtype], "chunk": list(block.chunk)}
        for name, block in blocks.items()
    }
    sealed = {name: digest_files.model_dump() for name, digest_files in files.digest_files(directory).items()}
    return _commit(directory, base, {**fields, "format": FORMAT, "arrays": entries, "files": sealed})


def _commit(directory: str, base: dict[str, Any], fields: Mapping[str, Any]) -> Manifest:
    content = json.loads(json.dumps({**fields, "sha256": ""}))  # what a reader will get back: no tuples
    content["sha256"] = _digest(content)
    manifest = Manifest.model_validate(content)
    try:
        store = ts.KvStore.open(base).result()
        absent = store.read(MANIFEST).result().stamp.generation
        stamp = store.write(MANIFEST, _text(content), if_equal=absent).result()
    except ValueError as error:
        raise arrays.explain(error, f"{directory}/{MANIFEST}") from error
    assert stamp.generation != b"", f"another writer has committed {directory} at the same time"
    return manifest


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({**fields, "sha256": ""}, sort_keys=True).encode()).hexdigest()


def _read(base: dict[str, Any], name: str, directory: str) -> bytes | None:
    try:
        found = ts.KvStore.open(base).result().read(name).result(timeout=arrays.ANSWER_SECONDS)
    except (ValueError, TimeoutError) as error:
        raise arrays.explain(error, directory) from error
    return bytes(found.value) if found.state == "value" else None
