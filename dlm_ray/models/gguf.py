"""Opens GGUF files (llama.cpp's format), and checks that they can be read. Needs the extra `gguf`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.models.gguf_file import FAMILIES, ROPE_FACTORS, GGUFFile, MetadataValue, StoredTensor

if TYPE_CHECKING:
    from gguf import ReaderTensor

MAGIC = b"GGUF"
_TOP = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_gguf(path: str) -> bool:
    """Return whether `path` is a GGUF file, by its extension or its first bytes."""
    if path.lower().endswith(".gguf"):
        return not Path(path).is_dir()
    try:
        with open(path, "rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:  # a folder, a name on the hub, a URL
        return False


def open_gguf(path: str) -> GGUFFile:
    """Open a GGUF file and check that all of it is readable: architecture, names, quantisations, length.

    Raises:
        UserError: if there is no such file, the package gguf is missing, or the kind of file is not supported.
        DamageError: if the file is damaged or truncated.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is no file here; a GGUF file has to lie on a local disk: give its path")
    status = Path(path).stat()
    return _opened(str(path), status.st_mtime_ns, status.st_size)


# Reading the metadata of a large vocabulary takes seconds, and configuration, tokenizer and weights all need them.
@lru_cache(maxsize=2)
def _opened(path: str, modified: int, size: int) -> GGUFFile:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"{path} is a GGUF file, which needs the package gguf, which is not installed; "
            "`pip install 'dlm-ray[gguf]'`"
        ) from error
    with open(path, "rb") as stream:
        begins = stream.read(len(MAGIC))
    if begins != MAGIC:
        raise UserError(
            f"{path} is no GGUF file: it begins with {begins!r} instead of {MAGIC!r}; is it the right file?"
        )
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        if gguf.GGMLQuantizationType.__name__ in str(error):
            raise UserError(
                f"{path} has a quantisation that this version of the package gguf does not know ({error}); supported "
                "are those that it dequantises, such as F16, BF16, Q8_0, Q4_K and Q6_K: choose such a file, or a newer "
                "gguf"
            ) from error
        raise DamageError(
            f"{path} is damaged, cut short, or of an unknown version of GGUF ({error}); fetch the file again"
        ) from error
    if reader.byte_order == "S":
        raise UserError(f"{path} is in the byte order of another kind of machine; convert it to this one's")
    _check_kind(path, metadata)
    _check_quantisations(path, reader.tensors)
    tensors, rope_factors = {}, None
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            rope_factors = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
            continue
        stored = StoredTensor(
            tensor.name,
            tuple(int(length) for length in reversed(tensor.shape)),
            tensor.tensor_type,
            np.asarray(tensor.data),
        )
        tensors[_huggingface_name(path, tensor.name)] = stored
    if "model.embed_tokens.weight" not in tensors:
        raise DamageError(f"{path} has no tensor token_embd.weight; fetch or convert the file again")
    return GGUFFile(path, metadata, tensors, rope_factors)


def _check_kind(path: str, metadata: Mapping[str, MetadataValue]) -> None:
    """Refuse files that are not a whole language model of a supported architecture."""
    architecture = metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise UserError(
            f"{path} is of architecture {architecture!r}, which is not supported; supported are {', '.join(FAMILIES)} "
            "(files of Mistral say llama); choose another file"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{path} holds no whole model but general.type={kind!r}; choose a file with a whole model")
    if (count := cast(int, metadata.get("split.count", 1))) > 1:
        raise UserError(
            f"{path} is one of {count} parts of a model; join them first with llama.cpp's `llama-gguf-split --merge`"
        )


def _check_quantisations(path: str, tensors: Sequence[ReaderTensor]) -> None:
    """Refuse quantisations that the package gguf cannot dequantise, before any tensor is read."""
    import gguf

    for quantisation in {tensor.tensor_type: None for tensor in tensors}:
        _, num_bytes = gguf.GGML_QUANT_SIZES[quantisation]
        try:
            gguf.dequantize(np.zeros((1, num_bytes), np.uint8), quantisation)
        except NotImplementedError as error:
            name = next(tensor.name for tensor in tensors if tensor.tensor_type == quantisation)
            raise UserError(
                f"{path} has the quantisation {quantisation.name} (tensor {name}), which is not supported: the package "
                "gguf does not dequantise it; choose a file of another, such as F16, BF16, Q8_0, Q4_K or Q6_K"
            ) from error


def _huggingface_name(path: str, name: str) -> str:
    """Return the Hugging Face name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in _IN_LAYER:
        families = ", ".join(FAMILIES.values())
        raise UserError(f"{path} has the tensor {name}, which no network of {families} has; choose another file")
    return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{kind}"
