"""The content of an opened GGUF file: a Hugging Face configuration, and tensors by Hugging Face name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from dlm_ray.config.errors import DamageError, UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MetadataValue = str | int | float | list[str] | list[int] | list[float]
"""A value of a file's metadata; booleans are integers."""
# The Hugging Face family of each `general.architecture`. llama.cpp has no architecture for Mistral: its files say
# llama, and a Llama network computes the same (Mistral differs only in its sliding window, which neither GGUF nor an
# adapted model has).
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FACTORS = "rope_freqs.weight"
# Keys below the architecture's name that the configuration accounts for. Any other may change the network: refused.
_KNOWN = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as stored in the file: quantised, with rows in llama.cpp's order."""

    name: str
    shape: tuple[int, ...]
    quantisation: GGMLQuantizationType
    data: np.ndarray
    """A view of the mapped file: values, or one row of bytes per row."""


@dataclass(frozen=True)
class GGUFFile:
    """An opened file of a supported architecture: its metadata in memory, its tensors mapped."""

    path: str
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, StoredTensor]
    """The tensors by Hugging Face name."""
    rope_factors: np.ndarray | None
    """Divisors of the rotary frequencies, which files of Llama 3.1 and later contain."""

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`."""
        return str(self.metadata["general.architecture"])

    def string(self, key: str) -> str | None:
        """Return a string of the metadata; None if it is missing."""
        return cast("str | None", self.metadata.get(key))

    def strings(self, key: str) -> list[str]:
        """Return a list of strings of the metadata; empty if it is missing."""
        return cast("list[str]", self.metadata.get(key, []))

    def integers(self, key: str) -> list[int]:
        """Return a list of integers of the metadata; empty if it is missing."""
        return cast("list[int]", self.metadata.get(key, []))

    def integer(self, key: str) -> int | None:
        """Return an integer of the metadata; None if it is missing."""
        return cast("int | None", self.metadata.get(key))

    def config(self) -> dict[str, object]:
        """Return the content of a Hugging Face config.json.

        Raises:
            UserError: if the file describes a network that the family's configuration cannot express.
        """
        self._refuse_unknown_keys()
        heads, width = self._integer("attention.head_count"), self._integer("embedding_length")
        head_dim = self._integer("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._integer(key, head_dim) != head_dim:
                setting = f"{self.architecture}.{key}={self._integer(key)}"
                raise self._refused(f"{setting} where heads have {head_dim} dimensions")
        family = FAMILIES[self.architecture]
        fields: dict[str, object] = {
            "model_type": family,
            "architectures": [f"{family.capitalize()}ForCausalLM"],
            "dtype": "float32",
            "hidden_act": "silu",
            "vocab_size": self.tensors["model.embed_tokens.weight"].shape[0],
            "hidden_size": width,
            "num_hidden_layers": self._integer("block_count"),
            "intermediate_size": self._integer("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._integer("context_length"),
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
        }
        if family != "qwen2":  # its queries, keys and values always have a bias
            fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.tensors
        if family == "llama":
            fields["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in self.tensors
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            if (token_id := self.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
                fields[name] = token_id
        return fields

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return a tensor by its Hugging Face name, or a region of it, as float32.

        Only the rows of the region are dequantised.
        """
        import gguf

        stored = self.tensors[name]
        index: slice | np.ndarray = region[0] if region else slice(None)
        if self.architecture == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            key = "attention.head_count" if match[1] == "q" else "attention.head_count_kv"
            index = _unpermuted_rows(stored.shape[0], self._integer(key, self._integer("attention.head_count")))[index]
        is_vector = len(stored.shape) == 1  # its quantised blocks, if it has any, run along its only dimension
        values = gguf.dequantize(stored.data if is_vector else stored.data[index], stored.quantisation)
        values = values[index] if is_vector else values[(slice(None), *region[1:])] if region else values
        return torch.from_numpy(np.require(values, np.float32, ["C_CONTIGUOUS", "WRITEABLE"]))

    def quantisations(self) -> dict[str, int]:
        """Return the number of tensors of each quantisation."""
        return dict(Counter(stored.quantisation.name for stored in self.tensors.values()))

    def _rope(self, head_dim: int) -> dict[str, object]:
        theta = self._float("rope.freq_base", 10000.0)
        kind = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if self.rope_factors is not None:
            if kind != "none":
                raise self._refused(f"both {ROPE_FACTORS} and {self.architecture}.rope.scaling.type={kind!r}")
            return {"rope_theta": theta, **self._llama3_scaling(theta, head_dim)}
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        scaling: dict[str, object] = {
            "rope_type": kind,
            "rope_theta": theta,
            "factor": self._float("rope.scaling.factor"),
        }
        if kind == "linear":
            return scaling
        if kind == "yarn":
            return {
                **scaling,
                "original_max_position_embeddings": self._integer("rope.scaling.original_context_length"),
            }
        raise self._refused(f"{self.architecture}.rope.scaling.type={kind!r}; supported are none, linear and yarn")

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, str | float]:
        """Return Llama 3.1's rotary settings, which the file does not store, if they produce the file's factors."""
        assert self.rope_factors is not None, "the caller has checked for factors"
        scaling: dict[str, float] = {
            "factor": float(self.rope_factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = _llama3_factors(scaling, theta, head_dim)
        if self.rope_factors.shape != expected.shape or not np.allclose(self.rope_factors, expected, rtol=1e-4):
            raise self._refused(f"{ROPE_FACTORS}, which differs from Llama 3.1's rotary scaling")
        return {"rope_type": "llama3", **scaling}

    def _refuse_unknown_keys(self) -> None:
        prefix = f"{self.architecture}."
        for key, value in self.metadata.items():
            if key.startswith(prefix) and key.removeprefix(prefix) not in _KNOWN and value not in (0, "", []):
                raise self._refused(f"{key}={value!r}")

    def _value(self, key: str, default: float | None) -> MetadataValue:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise DamageError(
                f"{self.path} has no {self.architecture}.{key} in its metadata; fetch or convert the file again"
            )
        return value

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, list):
            raise self._refused(f"layers that differ ({self.architecture}.{key}={value[:3]}...)")
        return int(value)

    def _float(self, key: str, default: float | None = None) -> float:
        """Return a value as the shortest decimal of its float32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(cast(float, self._value(key, default)))))

    def _refused(self, feature: str) -> UserError:
        return UserError(
            f"{self.path} has {feature}: dlm_ray has no Hugging Face configuration for it; choose another file"
        )


def _unpermuted_rows(num_rows: int, heads: int) -> np.ndarray:
    """Return the index in llama.cpp's order of each row of a query or key projection.

    Hugging Face rotates dimension i of a head with i + D/2, llama.cpp's llama architecture rotates 2i with 2i + 1, so
    its converter interleaves the halves.
    """
    return np.arange(num_rows).reshape(heads, num_rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _llama3_factors(scaling: Mapping[str, float], theta: float, head_dim: int) -> np.ndarray:
    """Return the divisors of the rotary frequencies, as llama.cpp's converter writes them."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    # Rotations of each dimension within the original context.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray = 1 / ((1 - share) / scaling["factor"] + share)
    return factors.astype(np.float32)
