"""The files of a pretrained model in any format: a configuration, and tensors for a network, sharded or not."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dlm_ray.checkpoint.arrays import region
from dlm_ray.checkpoint.layout import block_of
from dlm_ray.config.errors import UserError
from dlm_ray.config.manifest_fields import JsonObject

# Buffers in older files of GPT-2 and Llama, which the networks compute.
_BUFFERS = re.compile(r".*\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)")
# A head that a file may contain although the network ties it to the embedding.
_OPTIONAL = {"lm_head.weight"}


class ModelFiles(ABC):
    """A pretrained model that is not a dlm_ray checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        """A folder or a file; `data.tokenizer.load_tokenizer` accepts it, too."""

    @abstractmethod
    def config(self) -> JsonObject:
        """Return the content of config.json."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the names of the tensors, ordered by file."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the type of the tensor that `read` returns."""

    @abstractmethod
    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return a tensor, or a region of it."""

    @torch.no_grad()
    def load(
        self, tensors: Mapping[str, Tensor], *, extra_rows: Collection[str] = (), seed: int = 0
    ) -> dict[str, float]:
        """Fill `tensors` in place, converted to their types; at most one tensor of the files is in memory.

        Args:
            tensors: the tensors by name; a DTensor reads only its own region.
            extra_rows: names of tensors with one row more than the files, for the mask token.
            seed: the seed of the new rows.

        Returns:
            The norms of the new rows, by name.

        Raises:
            UserError: if a name is missing or unexpected, or a shape differs.
            DamageError: if a file is missing or cut short.
        """
        stored = self._match_names(tensors)
        place = {name: number for number, name in enumerate(self.names())}
        norms = {}
        for name, tensor in sorted(tensors.items(), key=lambda item: place[stored[item[0]]]):
            shape = self.shape(stored[name])
            if name in extra_rows:
                self._check_shape((shape[0] + 1, *shape[1:]), tensor, name)
                norms[name] = fill_with_extra_row(tensor, self.read(stored[name]), name, seed)
                continue
            self._check_shape(shape, tensor, name)
            block = block_of(tensor)
            if block.local.numel():
                block.local.copy_(self.read(stored[name], region(block.offset, block.local.shape)))
        return norms

    def _match_names(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the name in the files for every tensor: the same, or without the model's prefix (as for GPT-2)."""
        have = {name for name in self.names() if not _BUFFERS.fullmatch(name)}
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
        missing = sorted(name for name, file_name in stored.items() if file_name not in have)
        unexpected = sorted(have - set(stored.values()) - _OPTIONAL)
        if missing or unexpected:
            raise UserError(
                f"{self.path} does not fit the network: missing {missing[:5] or 'nothing'}, unexpected "
                f"{unexpected[:5] or 'nothing'}; does its configuration belong to these weights?"
            )
        return stored

    def _check_shape(self, shape: tuple[int, ...], tensor: Tensor, name: str) -> None:
        if shape != tuple(tensor.shape):
            raise UserError(
                f"{self.path}: {name} has shape {list(shape)} where the network has {list(tensor.shape)}; does its "
                "configuration belong to these weights?"
            )


@torch.no_grad()
def fill_with_extra_row(tensor: Tensor, rows: Tensor, name: str, seed: int) -> float:
    """Fill [V + 1, D] with `rows` [V, D] and a new last row, and return the norm of the new row.

    The new row is the mean of the others plus N(0, 1/D) noise, as in DiffuGPT (arXiv 2410.17891). It is the same on any
    number of ranks.
    """
    digest = hashlib.sha256(f"{seed}/{name}/mask".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    num_rows, width = rows.shape
    new = rows.mean(0, dtype=torch.float32) + torch.randn(width, generator=generator) / width**0.5
    block = block_of(tensor)
    assert block.local.shape[1:] == tensor.shape[1:], f"{name} must be sharded by rows"
    if block.local.numel():
        # These are rows of the file, without the new one.
        stored = rows[block.offset[0] : block.offset[0] + block.local.shape[0]]
        block.local[: len(stored)].copy_(stored)
        if block.offset[0] + block.local.shape[0] > num_rows:
            block.local[-1].copy_(new)
    return float(new.norm())
