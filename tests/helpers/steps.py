"""A committed step without a training run."""

import torch
from transformers import AutoModelForCausalLM

from dlm_ray.checkpoint import commit, listing


def commit_step(run, config, *, with_ema=True, **kinds):
    """Commit one step of a network with random weights, as the trainer would.

    Return its raw and its averaged weights.
    """
    torch.manual_seed(0)
    raw = {name: parameter.detach() for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters()}
    averaged = {name: parameter * 0.5 for name, parameter in raw.items()}
    tensors = {f"model.{name}": tensor for name, tensor in raw.items()} | {"optimizer.a.exp_avg": torch.ones(3)}
    if with_ema:
        tensors |= {f"ema.{name}": tensor for name, tensor in averaged.items()}
    fields = {
        "step": 12,
        "recipe": {"name": "tiny"},
        "tokenizer": {"name": "words", "sha256": "ab" * 32},
        "model": {
            "config": config.to_dict(),
            "mask_id": 49,
            "shift": True,
            "objective": "masked",
            "is_causal": False,
            **kinds,
        },
        "capabilities": {"sequence_length": 32, "document_mask": True},
        "cursor": {},
        "extra": {},
    }
    commit.save(listing.step_directory(run, 12), tensors, fields)
    return raw, averaged


def weights_of(folder):
    """Return the parameters that stock transformers reads from a folder."""
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
