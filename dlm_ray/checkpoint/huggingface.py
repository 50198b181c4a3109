"""Weights from a Hugging Face folder into tensors that may be sharded: each rank reads its own region of each safetensors file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dlm_ray.checkpoint.arrays import region
from dlm_ray.checkpoint.layout import block_of
from dlm_ray.config.errors import DamageError, UserError

# Buffers that older files of GPT-2 and Llama carry, and that the networks compute themselves.
_BUFFERS = re.compile(r".*\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)")


def resolve_folder(name_or_path: str) -> Path:
    """A local folder with a config.json, or a hub name's download.

    Raises:
        UserError: if it is neither.
    """
    folder = Path(name_or_path)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise UserError(
            f"{name_or_path} is neither a checkpoint of ours (no step with a manifest.json) nor a Hugging Face folder (no config.json)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name_or_path!r} is no folder here, and the hub gave nothing under that name ({type(error).__name__}); give a checkpoint, a "
            "Hugging Face folder, or a hub name with the network at hand"
        ) from error


@torch.no_grad()
def load_safetensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    optional: Collection[str] = (),
    extra_rows: Collection[str] = (),
    seed: int = 0,
) -> dict[str, float]:
    """Fills `tensors` in place from the folder, converted to their types.

    Args:
        folder: with model.safetensors, or several files and their index.
        tensors: by name; DTensors take their own region.
        optional: names that the file may carry without being wanted (a head that is tied).
        extra_rows: names of tensors with one row more than the file: the mask token's.
        seed: of the new rows.

    Returns:
        The norms of the new rows, by name.

    Raises:
        UserError: if a name is missing or not wanted, or a shape differs.
        DamageError: if a file is missing or cut short (safetensors files carry no checksum: a flipped bit in them is not noticed).
    """
    located = _locate(folder)
    stored = _match_names(located, tensors, optional, folder)
    norms = {}
    for file in sorted({located[name] for name in stored.values()}):
        with _opened(file) as archive:
            for name, tensor in tensors.items():
                if located[stored[name]] != file:
                    continue
                part = archive.get_slice(stored[name])
                shape = tuple(part.get_shape())
                if name in extra_rows:
                    _check_shape((shape[0] + 1, *shape[1:]), tensor, name, folder)
                    norms[name] = fill_with_extra_row(tensor, archive.get_tensor(stored[name]), name, seed)
                    continue
                _check_shape(shape, tensor, name, folder)
                block = block_of(tensor)
                if block.local.numel():
                    block.local.copy_(part[region(block.offset, block.local.shape)])
    return norms


@torch.no_grad()
def fill_with_extra_row(tensor: Tensor, rows: Tensor, name: str, seed: int) -> float:
    """Fills [V + 1, D] with `rows` [V, D] and a new last row, the same on any number of ranks; returns the new row's norm.

    The new row is the mean of the others plus N(0, 1/D) noise (DiffuGPT's, arXiv 2410.17891).
    """
    digest = hashlib.sha256(f"{seed}/{name}/mask".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    num_rows, width = rows.shape
    new = rows.mean(0, dtype=torch.float32) + torch.randn(width, generator=generator) / width**0.5
    block = block_of(tensor)
    assert block.local.shape[1:] == tensor.shape[1:], f"{name} is sharded in another dimension than its rows"
    if block.local.numel():
        own = rows[
            block.offset[0] : block.offset[0] + block.local.shape[0]
        ]  # the new row, behind the file's last, is not among them
        block.local[: len(own)].copy_(own)
        if block.offset[0] + block.local.shape[0] > num_rows:
            block.local[-1].copy_(new)
    return float(new.norm())


def _opened(file: str | Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise DamageError(f"{file} is missing or damaged: {error}; fetch the folder again") from error


def _locate(folder: Path) -> dict[str, str]:
    """The file of every tensor in the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise DamageError(f"{index} is damaged: {error}; fetch the folder again") from error
        return {name: str(folder / file) for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        legacy = next(folder.glob("*.bin"), None)
        hint = f"; {legacy.name} is a pickle, which is never opened: convert it to safetensors" if legacy else ""
        raise UserError(f"{folder} has no model.safetensors{hint}")
    with _opened(single) as archive:
        return {name: str(single) for name in archive.keys()}  # noqa: SIM118  (it is no mapping)


def _match_names(
    located: Mapping[str, str], tensors: Mapping[str, Tensor], optional: Collection[str], folder: Path
) -> dict[str, str]:
    """For every wanted name, the name in the file: the same, or without the model's prefix (as GPT-2's own files have it)."""
    have = {name for name in located if not _BUFFERS.fullmatch(name)}
    prefixes = {name.partition(".")[0] + "." for name in tensors}
    stored = {}
    for name in tensors:
        bare = next(
            (
                name.removeprefix(prefix)
                for prefix in prefixes
                if name.startswith(prefix) and name.removeprefix(prefix) in have
            ),
            name,
        )
        stored[name] = name if name in have else bare
    missing = sorted(name for name, found in stored.items() if found not in have)
    unwanted = sorted(have - set(stored.values()) - set(optional))
    if missing or unwanted:
        raise UserError(
            f"{folder} does not fit the network: missing {missing[:5] or 'nothing'}, not wanted {unwanted[:5] or 'nothing'}; is config.json the one of "
            "these weights?"
        )
    return stored


def _check_shape(shape: tuple[int, ...], tensor: Tensor, name: str, folder: Path) -> None:
    if shape != tuple(tensor.shape):
        raise UserError(
            f"{folder}: {name} has shape {list(shape)} where the network has {list(tensor.shape)}; is config.json the one of these weights?"
        )
