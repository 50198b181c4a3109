"""Open a pretrained model by name: a GGUF file, a Hugging Face folder, or a hub name."""

from __future__ import annotations

from pathlib import Path

from dlm_ray.checkpoint.gguf import GGUFModel
from dlm_ray.checkpoint.huggingface import HuggingFaceFolder, resolve_folder
from dlm_ray.checkpoint.model_files import ModelFiles
from dlm_ray.models.gguf import is_gguf


def open_pretrained(name_or_path: str) -> ModelFiles:
    """Return the files of a model that is not a dlm_ray checkpoint (`weights.our_checkpoint` finds those).

    Raises:
        UserError: if no model has this name, or its format is not supported.
        DamageError: if it is a damaged GGUF file.
    """
    if is_gguf(name_or_path):
        return GGUFModel(Path(name_or_path))
    return HuggingFaceFolder(resolve_folder(name_or_path))
