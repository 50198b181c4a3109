"""The files of a pretrained model in any format: a configuration, and tensors that fill a network, sharded or not."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm_ray.checkpoint.arrays import region
from dlm_ray.checkpoint.layout import block_of
from dlm_ray.config.errors import UserError

# Buffers that older files of GPT-2 and Llama carry, and that the networks compute themselves.
_BUFFERS = re.compile(r".*\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)")
# A head that a file carries although the network ties it to the embedding.
_OPTIONAL = {"lm_head.weight"}


class ModelFiles(ABC):
    """A pretrained model that is no checkpoint of ours."""

    def __init__(self, path: Path):
        self.path = path
        """A folder or a file; `data.tokenizer.load_tokenizer` takes it, too."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names of the tensors, in an order that reads the files one after the other."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The type that `read` gives a tensor."""

    @abstractmethod
    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or a region of it."""

    @torch.no_grad()
    def load(
        self, tensors: Mapping[str, Tensor], *, extra_rows: Collection[str] = (), seed: int = 0
    ) -> dict[str, float]:
        """Fills `tensors` in place, converted to their types; one tensor of the files is in memory at a time.

        Args:
            tensors: by name; DTensors take their own region.
            extra_rows: names of tensors with one row more than the files: the mask token's.
            seed: of the new rows.

        Returns:
            The norms of the new rows, by name.

        Raises:
            UserError: if a name is missing or not wanted, or a shape differs.
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
        """Return the name in the files of every wanted name: the same, or without the model's prefix (as in GPT-2's files)."""
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
        missing = sorted(name for name, found in stored.items() if found not in have)
        unwanted = sorted(have - set(stored.values()) - _OPTIONAL)
        if missing or unwanted:
            raise UserError(
                f"{self.path} does not fit the network: missing {missing[:5] or 'nothing'}, not wanted "
                f"{unwanted[:5] or 'nothing'}; is its configuration the one of these weights?"
            )
        return stored

    def _check_shape(self, shape: tuple[int, ...], tensor: Tensor, name: str) -> None:
        if shape != tuple(tensor.shape):
            raise UserError(
                f"{self.path}: {name} has shape {list(shape)} where the network has {list(tensor.shape)}; is its "
                "configuration the one of these weights?"
            )


@torch.no_grad()
def fill_with_extra_row(tensor: Tensor, rows: Tensor, name: str, seed: int) -> float:
    """Fills [V + 1, D] with `rows` [V, D] and a new last row, the same on any number of ranks; returns its norm.

    The new row is the mean of the others plus N(0, 1/D) noise (DiffuGPT's, arXiv 2410.17891).
    """
    digest = hashlib.sha256(f"{seed}/{name}/mask".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    num_rows, width = rows.shape
    new = rows.mean(0, dtype=torch.float32) + torch.randn(width, generator=generator) / width**0.5
    block = block_of(tensor)
    assert block.local.shape[1:] == tensor.shape[1:], f"{name} is sharded in another dimension than its rows"
    if block.local.numel():
        # The new row, behind the file's last, is not among them.
        own = rows[block.offset[0] : block.offset[0] + block.local.shape[0]]
        block.local[: len(own)].copy_(own)
        if block.offset[0] + block.local.shape[0] > num_rows:
            block.local[-1].copy_(new)
    return float(new.norm())
