"""A GGUF file as the files of a pretrained model: one tensor at a time is dequantised, and only the rows that are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm_ray.checkpoint.model_files import ModelFiles
from dlm_ray.models.gguf import open_gguf


class GGUFModel(ModelFiles):
    """One file with configuration, tokenizer and quantised tensors, which is only read."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = open_gguf(str(path))

    def config(self) -> dict[str, Any]:
        """See ModelFiles."""
        return self._file.config()

    def names(self) -> Sequence[str]:
        """See ModelFiles."""
        return list(self._file.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See ModelFiles."""
        return self._file.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """See ModelFiles."""
        return torch.float32

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """See ModelFiles."""
        return self._file.read(name, region)

    def describe(self) -> str:
        """What the file is, for people: its own name and its quantisations."""
        quantised = ", ".join(f"{count} {name}" for name, count in sorted(self._file.quantisations().items()))
        return f"{self._file.metadata.get('general.name', 'a model without a name')} ({quantised})"

    @property
    def license(self) -> str | None:
        """As the file says it."""
        said: str | None = self._file.metadata.get("general.license")
        return said
