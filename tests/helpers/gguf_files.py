"""Tiny GGUF files for the tests, written with the package's own writer as llama.cpp's converter does it."""

import json

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

# Widths are multiples of the 32 numbers of a block; queries and keys differ in the number of heads.
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, rope_parameters=ROPE),
    "llama-tied": LlamaConfig(**SHAPE, rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, rope_parameters=ROPE),
    "qwen3": Qwen3Config(**{**SHAPE, "head_dim": 32}, rope_parameters=ROPE, tie_word_embeddings=True),
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXT = [
    "The year 1984 isn't 2024, said naïve José.",
    "def f(x):\n    return x + 12345\n",
    "  spaces   and\ttabs\r\n\r\n",
    "WE'LL see; we'll see",
]


def random_network(config, seed=0):
    """A network with random weights; the norms are random, too, so that an exchange of two is seen."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(
                    torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * 0.1
                )
    return network


def train_bpe(pre_tokenizer=None, size=SHAPE["vocab_size"] - 1):
    """Vocabulary and merges of a byte-level BPE; the special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def gguf_fields(config, pre, bpe):
    """Return the metadata of a network and its tokenizer; keys of the architecture are without its name."""
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if config.model_type == "qwen3":
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    else:
        fields |= {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
    vocabulary, merges = bpe or train_bpe()
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens += [f"[PAD{number}]" for number in range(len(tokens), config.vocab_size)]
    fields |= {
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            3 if token in SPECIAL else 5 if token.startswith("[PAD") else 1 for token in tokens
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.chat_template": TEMPLATE,
    }
    return fields


def write_gguf(path, network, *, quantisations=None, pre="gpt-2", bpe=None, metadata=None, raw=None):
    """Writes the network and a tokenizer as llama.cpp's convert_hf_to_gguf.py would.

    Args:
        path: of the file.
        network: of Hugging Face.
        quantisations: by a part of the tensor's name in the file; float32 without.
        pre: the kind of pre-tokenizer.
        bpe: vocabulary and merges.
        metadata: more keys below the architecture's name, or full ones with `general.` and `tokenizer.`; None leaves
            one out.
        raw: tensors as (bytes, quantisation) by name, instead of the network's.

    Returns:
        What the file holds: by name, the array that its bytes decode to.
    """
    config, arch = network.config, network.config.model_type
    fields = gguf_fields(config, pre, bpe) | (metadata or {})
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", arch))
    for key, value in fields.items():
        key = key if key.startswith(("general.", "tokenizer.", "split.")) else f"{writer.arch}.{key}"
        if value is not None:
            add_field(writer, key, value)
    held = {}
    names = gguf.get_tensor_name_map(
        next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = tensor.numpy()
        if arch == "llama" and ("attn_q." in stored or "attn_k." in stored):
            heads = config.num_attention_heads if "attn_q." in stored else config.num_key_value_heads
            values = permuted(values, heads)
        held[stored] = add_tensor(writer, stored, values, quantisations or {}, raw or {})
    for name in {*(raw or {})} - {*held}:
        add_tensor(writer, name, None, {}, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def permuted(values, heads):
    """Return the rows of a Llama query or key matrix in llama.cpp's order (its function `permute`)."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def add_field(writer, key, value):
    """Adds a value with the type that llama.cpp gives it."""
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)


def add_tensor(writer, name, values, quantisations, raw):
    """Adds a tensor, quantised if it has to be; returns what its bytes decode to by the package."""
    if name in raw:
        data, kind = raw[name]
        writer.add_tensor(name, data, raw_dtype=kind)
        return data
    kind = next(
        (kind for part, kind in quantisations.items() if part in name and values.ndim > 1),
        gguf.GGMLQuantizationType.F32,
    )
    data = gguf.quantize(np.ascontiguousarray(values), kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    return gguf.dequantize(data, kind)
