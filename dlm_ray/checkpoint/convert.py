"""Convert any model that dlm_ray reads (a GGUF file, a Hugging Face folder, a checkpoint) to a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from dlm_ray.checkpoint.export import check_is_new, export, new_folder, write_config, write_weights
from dlm_ray.checkpoint.gguf import GGUFModel
from dlm_ray.checkpoint.huggingface import SMALL_FILES
from dlm_ray.checkpoint.model_files import ModelFiles
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.checkpoint.weights import our_checkpoint
from dlm_ray.config.errors import UserError
from dlm_ray.models.gguf_tokenizer import gguf_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CARD = """---
library_name: transformers
{license}---
# {name}

Converted by dlm_ray from the GGUF file `{name}`: {description}.

The quantized weights are stored as {dtype}: this is the rounded model, not the model before quantization.
"""


def convert(source: str, out: str, *, weights: str | None = None, dtype: str | None = None) -> Path:
    """Write config.json, model*.safetensors and the tokenizer of `source` to `out`, completely or not at all.

    Args:
        source: a GGUF file, a Hugging Face folder or hub name, or a dlm_ray checkpoint.
        out: a folder that does not exist, or is empty.
        weights: for a dlm_ray checkpoint, `ema`, `raw`, or None: the average if the run kept one.
        dtype: float32, bfloat16 or float16; None keeps the stored type, and dequantizes to float32.

    Raises:
        UserError: if `source` is not a supported model, or `out` is not a new folder.
        DamageError: if `source` is damaged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError.of("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    if out.lower().endswith(".gguf"):
        raise UserError(
            f"{out} would be a GGUF file, which dlm_ray only reads; name a folder, and convert it with "
            "llama.cpp's converter"
        )
    check_is_new(out)
    if our_checkpoint(source) is not None:
        return export(source, out, weights=weights, dtype=DTYPES[dtype] if dtype else None)
    if weights is not None:
        raise UserError(
            f"weights={weights} selects weights of a dlm_ray checkpoint, and {source} is not one; omit `weights`"
        )
    files = open_pretrained(source)
    with new_folder(out) as folder:
        config = files.config() | ({"dtype": dtype} if dtype else {})
        write_config(config, folder)
        types = {name: (files.shape(name), _type(files.dtype(name), dtype)) for name in files.names()}
        if isinstance(files, GGUFModel):
            gguf_tokenizer(str(files.path)).save_pretrained(folder)
            (folder / "README.md").write_text(_card(files, config["dtype"]))
        else:
            _copy_small_files(files, folder)
        write_weights(types, files.read, folder)
    return Path(out)


def _type(stored: torch.dtype, dtype: str | None) -> torch.dtype:
    return DTYPES[dtype] if dtype is not None and stored.is_floating_point else stored


def _copy_small_files(files: ModelFiles, folder: Path) -> None:
    """Copy the tokenizer, the chat template and the generation settings unchanged."""
    for pattern in SMALL_FILES:
        for path in files.path.glob(pattern):
            if path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)


def _card(files: GGUFModel, dtype: str) -> str:
    license_line = f"license: {files.license}\n" if files.license else ""
    return _CARD.format(license=license_line, name=files.path.name, description=files.describe(), dtype=dtype)
