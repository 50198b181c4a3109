"""A Hugging Face folder, local or from the hub; each rank reads its own region of each safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dlm_ray.checkpoint.description import OBJECTIVE_FILE
from dlm_ray.checkpoint.model_files import ModelFiles
from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.paths import is_url

# The files to download and copy, in addition to *.safetensors.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


class _Slice(Protocol):
    """A tensor in a safetensors file, of which regions are read."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, region: tuple[slice, ...] | EllipsisType) -> Tensor: ...


class HuggingFaceFolder(ModelFiles):
    """A folder with config.json and model.safetensors, or several files and their index.

    Safetensors files have no checksum: a flipped bit in them goes unnoticed.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._located: dict[str, str] | None = None
        self._archive: tuple[str, safe_open] | None = None
        """The most recently used file."""

    def config(self) -> JsonObject:
        """See the method of ModelFiles."""
        fields: JsonObject = json.loads((self.path / "config.json").read_text())
        return fields

    def names(self) -> Sequence[str]:
        """See the method of ModelFiles."""
        return sorted(self._files(), key=lambda name: (self._files()[name], name))

    def shape(self, name: str) -> tuple[int, ...]:
        """See the method of ModelFiles."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """See the method of ModelFiles."""
        return self.read(name, tuple(slice(0, 0) for _ in self.shape(name))).dtype

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """See the method of ModelFiles."""
        return self._slice(name)[region or ...]

    def _slice(self, name: str) -> _Slice:
        file = self._files()[name]
        if self._archive is None or self._archive[0] != file:
            self._archive = (file, _opened(file))
        tensor: _Slice = self._archive[1].get_slice(name)  # type: ignore[no-untyped-call]  # not annotated
        return tensor

    def _files(self) -> dict[str, str]:
        """Return the file of every tensor in the folder."""
        if self._located is None:
            self._located = _locate(self.path)
        return self._located


def resolve_folder(name_or_path: str) -> Path:
    """Return a local folder with a config.json, or the download of a hub name.

    Raises:
        UserError: if the name is neither.
    """
    if is_url(name_or_path):
        raise UserError(
            f"{name_or_path} is not a dlm_ray checkpoint: neither it nor a step in it has a manifest.json. A Hugging "
            "Face folder must be on a local disk; copy it, or give its hub name"
        )
    folder = Path(name_or_path)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise UserError(
            f"{name_or_path} is neither a dlm_ray checkpoint (no step with a manifest.json) nor a Hugging Face folder "
            "(no config.json) nor a GGUF file"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name_or_path, allow_patterns=["*.safetensors", *SMALL_FILES]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name_or_path!r} is not a local folder, and the hub has nothing of that name ({type(error).__name__}); "
            "give a checkpoint, a Hugging Face folder, a GGUF file, or a hub name with network access"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name_or_path!r} has no config.json on the hub; if it has GGUF files, download one (`hf download`) and "
            "give the path of the file"
        )
    return folder


@torch.no_grad()
def load_objective(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Fill the parameters of an objective by name, from their file in an export.

    Raises:
        UserError: if a name is missing or a shape differs.
        DamageError: if the file is missing or truncated.
    """
    if not parameters and not (folder / OBJECTIVE_FILE).exists():
        return
    with _opened(folder / OBJECTIVE_FILE) as archive:
        stored = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118  (not a mapping)
    if stored.keys() != parameters.keys():
        raise UserError(
            f"{folder / OBJECTIVE_FILE} holds {sorted(stored)} where the objective has {sorted(parameters)}; export "
            "the checkpoint again"
        )
    for name, parameter in parameters.items():
        if stored[name].shape != parameter.shape:
            raise UserError(
                f"{folder / OBJECTIVE_FILE}: {name} has shape {tuple(stored[name].shape)} and the objective expects "
                f"{tuple(parameter.shape)}; export the checkpoint again"
            )
        parameter.copy_(stored[name])


def _opened(file: str | Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise DamageError(f"{file} is missing or damaged: {error}; fetch the folder again") from error


def _locate(folder: Path) -> dict[str, str]:
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
        hint = f"; {legacy.name} is a pickle, which dlm_ray never opens: convert it to safetensors" if legacy else ""
        raise UserError(f"{folder} has no model.safetensors{hint}")
    with _opened(single) as archive:
        return {name: str(single) for name in archive.keys()}  # noqa: SIM118  (not a mapping)
