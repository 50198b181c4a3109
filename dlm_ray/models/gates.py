"""Gates that a model family has to pass before it can be a denoiser, each on a tiny random network of the family.

The oracle is the model of transformers with the same weights, its eager attention and dense masks.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from dlm_ray.config.errors import UserError
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser

_VOCAB, _LENGTH, _BLOCK = 61, 16, 4
_TOLERANCE = 2e-5
# The sizes of a tiny network; a configuration gets those that it has.
_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "vocab_size": _VOCAB + 1,
    "vocab_size_per_layer_input": _VOCAB + 1,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


@dataclass(frozen=True)
class GateResult:
    """Whether a family passes one gate."""

    name: str
    """What the gate checks."""
    failure: str = ""
    """Why it does not pass; empty if it does."""


@dataclass
class _Subject:
    """A tiny denoiser and the model of transformers with the same weights."""

    config: PreTrainedConfig
    denoiser: HuggingFaceDenoiser
    stock: Any
    ids: Tensor
    """[2, L] int64."""


def check_family(config: PreTrainedConfig) -> list[GateResult]:
    """Return the result of every gate for the family of a configuration, at a tiny size; the rest of it is kept."""
    results: list[GateResult] = []
    with torch.random.fork_rng(), _quiet_transformers():
        torch.manual_seed(0)
        try:
            subject = _subject(families.adaptable(tiny(config)))
        except Exception as error:  # the code of any family runs here, and its error is the result
            return [GateResult("builds", _reason(error))]
        results.append(GateResult("builds"))
        for name, gate in GATES.items():
            try:
                with torch.no_grad():
                    failure = gate(subject)
            except Exception as error:
                failure = _reason(error)
            results.append(GateResult(name, failure))
    return results


def config_of(name_or_fields: str | dict[str, Any]) -> PreTrainedConfig:
    """Return the default configuration of a model type such as `olmo2`, or that of the fields of a config.json.

    Raises:
        UserError: if transformers does not know the model type.
    """
    fields = {"model_type": name_or_fields} if isinstance(name_or_fields, str) else dict(name_or_fields)
    model_type = str(fields.pop("model_type", None))
    try:
        with _quiet_transformers():
            return AutoConfig.for_model(model_type, **fields)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"transformers does not know the model type {model_type!r}; give one such as olmo2, a Hugging Face folder "
            "or a hub name"
        ) from error


def is_model_type(name: str) -> bool:
    """Return whether transformers has a model type of this name."""
    return name in CONFIG_MAPPING_NAMES


def tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a configuration with tiny sizes."""
    small = copy.deepcopy(config)
    for name, value in _TINY.items():
        if getattr(small, name, None) is not None and not isinstance(getattr(type(small), name, None), property):
            setattr(small, name, value)
    for name in _PER_LAYER:
        if getattr(small, name, None):
            setattr(small, name, list(getattr(small, name))[: _TINY["num_hidden_layers"]])
    return small


def _subject(config: PreTrainedConfig) -> _Subject:
    denoiser = parallel.build(config, _VOCAB, shift=True)
    parallel.materialize(denoiser, torch.device("cpu"))
    parallel.initialize(denoiser, seed=1)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():  # norms and biases, too, so that each has an effect
            parameter.add_(0.05 * torch.randn_like(parameter))
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
    stock.load_state_dict(denoiser.network.state_dict())
    return _Subject(config, denoiser.eval(), stock.eval(), torch.randint(1, _VOCAB, (2, _LENGTH)))


def _structure(subject: _Subject) -> str:
    """Check that layers, embedding and head are found, as FSDP2, the mask row and the loss need them."""
    denoiser = subject.denoiser
    if len(denoiser.layers) != subject.config.num_hidden_layers:
        return f"{len(denoiser.layers)} layers where the configuration has {subject.config.num_hidden_layers}"
    if tuple(denoiser.embedding.shape) != (_VOCAB + 1, subject.config.hidden_size):
        return f"the embedding has shape {list(denoiser.embedding.shape)}"
    head = denoiser.network.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return "the head is missing or has a bias, which the denoiser would leave out"
    return ""


def _buffers(subject: _Subject) -> str:
    """Check that a build on the meta device has the buffers of a direct build."""
    ours, theirs = dict(subject.denoiser.network.named_buffers()), dict(subject.stock.named_buffers())
    wrong = sorted(name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name]))
    return f"buffers that a meta build leaves wrong: {', '.join(wrong[:3])}" if wrong else ""


def _causal(subject: _Subject) -> str:
    """Check causal logits against the model's own."""
    hidden = subject.denoiser.hidden(subject.ids, Visibility("causal"))
    ours = subject.denoiser.reduce_logits(hidden.flatten(0, 1), lambda logits: logits)
    # Without a mask, some families would build one for sliding windows, which the configuration no longer has.
    mask = _additive(Visibility("causal"), subject)
    theirs = subject.stock(subject.ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)[:, :_VOCAB]
    return _difference(ours, theirs, "causal logits")


def _visibility(subject: _Subject) -> str:
    """Check other visibilities against dense masks in eager attention: blocks, documents, random future positions."""
    documents = torch.tensor([[0] * 6 + [1] * (_LENGTH - 6)]).expand(2, -1)
    for name, visibility in {
        "bidirectional": Visibility("bidirectional"),
        "blocks": Visibility("bidirectional", block_tokens=_BLOCK),
        "documents": Visibility("causal", document_ids=documents),
        "annealed": Visibility("bernoulli", hash_limit=2**31, salt=3),
    }.items():
        theirs = subject.stock.base_model(
            input_ids=subject.ids, attention_mask=_additive(visibility, subject), use_cache=False
        ).last_hidden_state
        failure = _difference(subject.denoiser.hidden(subject.ids, visibility), theirs, f"visibility {name}")
        if failure:
            return failure
    return ""


def _additive(visibility: Visibility, subject: _Subject) -> Tensor:
    """Return a dense mask [B, 1, L, L] of 0 and the lowest number, as eager attention adds it."""
    seen = visibility.dense(_LENGTH, subject.ids.device).expand(2, 1, _LENGTH, _LENGTH)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def _embeddings(subject: _Subject) -> str:
    """Check that embeddings as input equal their ids as input."""
    visibility = Visibility("bidirectional")
    ours = subject.denoiser.hidden(subject.denoiser.embed(subject.ids), visibility)
    return _difference(ours, subject.denoiser.hidden(subject.ids, visibility), "embeddings as input")


def _states(subject: _Subject) -> str:
    """Check the hidden states of every layer, which distillation aligns."""
    visibility = Visibility("causal")
    states = subject.denoiser.states(subject.ids, visibility)
    if len(states) != subject.config.num_hidden_layers + 1:
        return f"{len(states)} hidden states of {subject.config.num_hidden_layers} layers"
    return _difference(states[-1], subject.denoiser.hidden(subject.ids, visibility), "the last hidden state")


def _cache(subject: _Subject) -> str:
    """Check that blocks over a KV cache have the hidden states of one pass."""
    visibility = Visibility("bidirectional", block_tokens=_BLOCK)
    whole = subject.denoiser.hidden(subject.ids, visibility)
    cache = subject.denoiser.new_cache(2, _LENGTH)
    for start in range(0, _LENGTH, _BLOCK):
        part = subject.denoiser.hidden(subject.ids[:, start : start + _BLOCK], visibility, cache)
        failure = _difference(part, whole[:, start : start + _BLOCK], f"block {start // _BLOCK} over the KV cache")
        if failure:
            return failure
        for slot in range(2):
            cache.commit(slot, _BLOCK, part[slot, -1])
    return ""


def _recorded(subject: _Subject) -> str:
    """Check that a pass over recorded keys and values has gradients through them, as block training needs."""
    with torch.enable_grad():
        visibility = Visibility("bidirectional", block_tokens=_BLOCK)
        _, kv = subject.denoiser.forward_with_kv(subject.ids, visibility)
    if len(kv._pairs) != subject.config.num_hidden_layers:
        return f"{len(kv._pairs)} layers record keys and values, of {subject.config.num_hidden_layers}"
    return ""


def _files(subject: _Subject) -> str:
    """Check that the tensors of a saved model have the names and the shapes of the network's parameters."""
    with tempfile.TemporaryDirectory() as folder:
        subject.stock.save_pretrained(folder)
        stored: dict[str, list[int]] = {}
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(str(path), "pt") as archive:
                stored |= {name: list(archive.get_slice(name).get_shape()) for name in archive.keys()}  # noqa: SIM118
    expected = {name: list(parameter.shape) for name, parameter in subject.denoiser.network.named_parameters()}
    wrong = sorted(name for name in expected | stored if expected.get(name) != stored.get(name))
    return f"files name or shape tensors differently: {', '.join(wrong[:3])}" if wrong else ""


GATES: dict[str, Callable[[_Subject], str]] = {
    "layers, embedding and head are found": _structure,
    "meta build has the right buffers": _buffers,
    "causal logits equal the model's own": _causal,
    "any visibility equals a dense mask": _visibility,
    "embeddings as input": _embeddings,
    "hidden states of every layer": _states,
    "blocks over a KV cache equal one pass": _cache,
    "keys and values of a pass can be recorded": _recorded,
    "files have the names of the parameters": _files,
}
"""What is checked -> the check, which returns why it fails, or an empty text."""


def _difference(ours: Tensor, theirs: Tensor, name: str) -> str:
    """Return a failure if two tensors differ by more than rounding."""
    if ours.shape != theirs.shape:
        return f"{name}: shape {list(ours.shape)}, expected {list(theirs.shape)}"
    difference = float((ours - theirs).abs().max())
    scale = max(1.0, float(theirs.abs().max()))
    return "" if difference <= _TOLERANCE * scale else f"{name} differ by {difference:.2g}"


def _reason(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers within the context: tiny sizes do not suit the other fields of a configuration."""
    before, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if has_bars:
            transformers_logging.enable_progress_bar()
