"""A GGUF file as the files of a pretrained model; tensors are dequantized one at a time, and only the needed rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dlm_ray.checkpoint.model_files import ModelFiles
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.models.gguf import open_gguf


class GGUFModel(ModelFiles):
    """A read-only file with configuration, tokenizer and quantized tensors."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = open_gguf(str(path))

    def config(self) -> JsonObject:
        """See the method of ModelFiles."""
        return self._file.config()

    def names(self) -> Sequence[str]:
        """See the method of ModelFiles."""
        return list(self._file.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See the method of ModelFiles."""
        return self._file.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """See the method of ModelFiles."""
        return torch.float32

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """See the method of ModelFiles."""
        return self._file.read(name, region)

    def describe(self) -> str:
        """Return a description for people: the model's name in the file, and its quantizations."""
        quantised = ", ".join(f"{count} {name}" for name, count in sorted(self._file.quantisations().items()))
        return f"{self._file.metadata.get('general.name', 'a model without a name')} ({quantised})"

    @property
    def license(self) -> str | None:
        """The license in the metadata of the file, if any."""
        return self._file.string("general.license")
