"""Configurations of the supported Hugging Face families: from scratch, from a folder, adapted to any visibility."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import cast

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from dlm_ray.config.errors import UserError
from dlm_ray.config.recipe import FAMILIES, Architecture, Family


def scratch_config(architecture: Architecture, vocab_size: int, start_id: int, end_id: int) -> PreTrainedConfig:
    """Return the configuration of a network from scratch.

    Args:
        architecture: the recipe's architecture.
        vocab_size: embedding rows, including the mask token's.
        start_id, end_id: written into the configuration for generation with other tools.
    """
    shared: dict[str, object] = {
        "vocab_size": vocab_size,
        "bos_token_id": start_id,
        "eos_token_id": end_id,
        "tie_word_embeddings": architecture.tie_embeddings,
    }
    if architecture.family == "gpt2":
        fields = {
            "n_embd": architecture.width,
            "n_layer": architecture.num_layers,
            "n_head": architecture.num_heads,
            "n_inner": architecture.intermediate,
            "n_positions": architecture.max_positions,
        }
    else:
        fields = {
            "hidden_size": architecture.width,
            "num_hidden_layers": architecture.num_layers,
            "num_attention_heads": architecture.num_heads,
            "num_key_value_heads": architecture.num_key_value_heads or architecture.num_heads,
            # Two thirds of 4 D, as is usual for gated layers, rounded up to a multiple of 64.
            "intermediate_size": architecture.intermediate or -(-8 * architecture.width // 3 // 64) * 64,
            "max_position_embeddings": architecture.max_positions,
            "head_dim": architecture.width // architecture.num_heads,
        }
    return adaptable(AutoConfig.for_model(architecture.family, **shared, **fields))


def read_config(fields: Mapping[str, object]) -> PreTrainedConfig:
    """Return the configuration whose `to_dict()` is `fields` (a config.json, or a manifest's `model.config`).

    A family that is not among `FAMILIES` is accepted if a tiny network of this configuration passes every gate.

    Raises:
        UserError: if the family is not supported.
    """
    fields = dict(fields)
    family = fields.pop("model_type", None)
    if not isinstance(family, str) or family not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"model_type={family!r} is not supported; supported families are {', '.join(FAMILIES)} and others that "
            "pass `dlm-ray doctor MODEL`; choose another model.base"
        )
    config = AutoConfig.for_model(family, **fields)
    if family not in FAMILIES:
        _check_gates(config.to_json_string())
    return adaptable(config)


@lru_cache(maxsize=8)
def _check_gates(config: str) -> None:
    """Raise UserError, with every failure, if the family of a configuration (JSON) does not pass its gates."""
    from dlm_ray.models.gates import check_family, config_of

    fields = json.loads(config)
    failures = [f"{gate.name}: {gate.failure}" for gate in check_family(config_of(fields)) if gate.failure]
    if failures:
        raise UserError(
            f"model_type={fields['model_type']!r} is not supported: it does not pass these checks:\n  "
            + "\n  ".join(failures)
            + f"\nsupported families are {', '.join(FAMILIES)} and others that pass `dlm-ray doctor MODEL`; choose "
            "another model.base"
        )


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the architecture that builds the network of a configuration from scratch."""
    return Architecture(
        family=cast(Family, config.model_type),  # checked when the configuration was read
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None),
        intermediate=config.n_inner if config.model_type == "gpt2" else config.intermediate_size,
        max_positions=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
    )


def adaptable(config: PreTrainedConfig) -> PreTrainedConfig:
    """Remove the options that would change the visibility or add noise: sliding window and dropout."""
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = False
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config
