"""Export a checkpoint as a Hugging Face folder that stock transformers opens, with one file of weights in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import tensorstore as ts
import torch
from safetensors.torch import save_file
from torch import Tensor

from dlm_ray.checkpoint import arrays, commit
from dlm_ray.checkpoint.description import KEY, OBJECTIVE_FILE, Description
from dlm_ray.checkpoint.manifest import Manifest, read_manifest
from dlm_ray.checkpoint.weights import our_checkpoint, weight_prefix
from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import local_path

FILE_BYTES = 4 * 10**9
# Older versions silently ignore `is_causal: false` in a configuration, and would run the model as causal.
MINIMUM_TRANSFORMERS = "5.17"

_CARD = """---
library_name: transformers
tags: [{tag}]
---
# {name}

Made by dlm_ray from step {step} of the run `{name}` (objective `{objective}`, weights `{weights}`).

{description}

Tokenizer: {tokenizer}, sha256 `{sha256}`. Sequences of training: {sequence_length} tokens.
"""

_DIFFUSION = """A masked diffusion language model{shift}. Its attention is bidirectional: `config.json` says
`is_causal: false`, which needs transformers >= {minimum}; an older version would ignore it and give wrong logits. The
mask token has id {mask_id}. `AutoModelForCausalLM` opens it and gives its logits; `generate` does not sample from it,
`dlm-ray sample` does."""

_SHIFT = ", in which position i is predicted by the logits of position i-1 (as in its autoregressive base)"


def export(checkpoint_dir: str, out: str, *, weights: str | None = None, dtype: torch.dtype | None = None) -> Path:
    """Write config.json, model*.safetensors, the tokenizer and a model card to `out`, completely or not at all.

    dlm_ray loads the export as it loads the checkpoint: config.json also holds the objective, the sequence length and
    the sampling (`checkpoint.description`), and the parameters of the objective have their own file.

    Args:
        checkpoint_dir: a step directory, or a run directory (its last step).
        out: a folder that does not exist, or is empty.
        weights: `ema`, `raw`, or None: the average if the run kept one.
        dtype: the type of the weights; None keeps the checkpoint's.

    Raises:
        UserError: if `out` is not empty, `checkpoint_dir` is not a checkpoint, or the export could not be sampled from.
        DamageError: if a tensor of the checkpoint is damaged.
    """
    check_is_new(out)
    checkpoint = our_checkpoint(checkpoint_dir)
    if checkpoint is None:
        raise UserError(f"{checkpoint_dir} is not a checkpoint: neither it nor a step in it has a manifest.json")
    manifest = read_manifest(checkpoint)
    if manifest.capabilities.get("canvas") == "simplex_blocks":
        raise UserError(
            f"{checkpoint} is an SSD-LM: its blocks see embeddings of noise that no Hugging Face model has, so an "
            "export could not be sampled; use `dlm-ray sample` on the checkpoint itself"
        )
    prefix = weight_prefix(manifest.arrays, weights, checkpoint)
    stored = {
        name.removeprefix(f"{prefix}."): entry
        for name, entry in manifest.arrays.items()
        if name.startswith(f"{prefix}.")
    }
    # The parameters of the objective have their own file.
    stored = {name: entry for name, entry in stored.items() if not name.startswith("objective.")}
    with new_folder(out) as folder:
        architecture = _architecture(manifest.model["config"]["model_type"])
        kept = next(entry.dtype for entry in stored.values())
        config = {
            **manifest.model["config"],
            "architectures": [architecture],
            "dtype": str(dtype).removeprefix("torch.") if dtype else kept,
            KEY: Description.of(manifest).model_dump(mode="json"),
        }
        write_config(config, folder)
        types = {
            name: (tuple(entry.shape), dtype or arrays.TORCH_DTYPES[entry.dtype]) for name, entry in stored.items()
        }
        write_weights(types, lambda name: commit.read_tensor(checkpoint, f"{prefix}.{name}"), folder)
        _write_objective(checkpoint, manifest, prefix, folder)
        _copy_tokenizer(checkpoint, folder)
        (folder / "README.md").write_text(_card(manifest, prefix))
    return Path(out)


def check_is_new(out: str) -> None:
    """Raise UserError unless `out` is a local folder that does not exist or is empty."""
    target = local_path(out, "FOLDER", "a local folder that does not exist yet")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another folder, or remove it")


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """Yield a folder that is renamed to `out` when the context ends without an exception, and removed otherwise."""
    target = Path(out)
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_config(config: Mapping[str, object], folder: Path) -> None:
    """Write config.json into the folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_weights(
    types: Mapping[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor], folder: Path
) -> None:
    """Write model.safetensors, or several files of FILE_BYTES with their index; one file at a time is in memory.

    Args:
        types: the shape and the stored type of every tensor, by name.
        read: returns a tensor by its name; it is converted to the stored type.
        folder: the folder of the files.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in types.items():
        size = dtype.itemsize
        for length in shape:
            size *= length
        if files[-1] and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, group in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(
            {name: read(name).to(types[name][1]).contiguous() for name in group},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(group, file)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
        )


def _copy_tokenizer(checkpoint: str, folder: Path) -> None:
    """Copy the files of `tokenizer/` in the run directory, local or remote."""
    run_dir = checkpoint.rstrip("/").rpartition("/")[0] or "."
    store = ts.KvStore.open(arrays.below(arrays.key_value_store(run_dir), "tokenizer")).result()
    for key in store.list().result():
        path = folder / key.decode()
        path.parent.mkdir(parents=True, exist_ok=True)  # additional chat templates are in a folder
        path.write_bytes(store.read(key).result().value)


def _write_objective(checkpoint: str, manifest: Manifest, prefix: str, folder: Path) -> None:
    """Write the parameters of the objective, if any, to a file that stock transformers does not open."""
    stored = "ema.objective." if prefix == "ema" else "objective."
    names = [name for name in manifest.arrays if name.startswith(stored)]
    tensors: dict[str, Tensor] = {name.removeprefix(stored): commit.read_tensor(checkpoint, name) for name in names}
    if tensors:
        save_file(tensors, folder / OBJECTIVE_FILE)


def _architecture(family: str) -> str:
    """Return the class name that stock transformers expects in `architectures`."""
    return {
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "mistral": "MistralForCausalLM",
    }[family]


def _card(manifest: Manifest, prefix: str) -> str:
    model = manifest.model
    description = "An autoregressive language model; `AutoModelForCausalLM` opens it and `generate` samples from it."
    if not model["is_causal"]:
        description = _DIFFUSION.format(
            shift=_SHIFT if model["shift"] else "", minimum=MINIMUM_TRANSFORMERS, mask_id=model["mask_id"]
        )
    return _CARD.format(
        tag="autoregressive" if model["is_causal"] else "diffusion-language-model",
        name=manifest.recipe.get("name", "run"),
        step=manifest.step,
        objective=model["objective"],
        weights="averaged (ema)" if prefix == "ema" else "raw",
        description=description,
        tokenizer=manifest.tokenizer["name"],
        sha256=manifest.tokenizer["sha256"][:16],
        sequence_length=manifest.capabilities["sequence_length"],
    )
