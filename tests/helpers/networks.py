"""Tiny networks of every family, the same weights in stock transformers, and one sampling rule of every kind."""

import copy

import torch
from transformers import AutoModelForCausalLM

from dlm_ray.config.recipe import Architecture
from dlm_ray.diffusion.samplers.rules import (
    Ancestral,
    Confidence,
    EntropyBounded,
    Factor,
    FirstHitting,
    Threshold,
)
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.models import families, parallel

VOCAB, LENGTH = 61, 24

RULES = {
    "first_hitting": FirstHitting(),
    "ancestral": Ancestral(Polynomial()),
    "remasking": Ancestral(Polynomial(), remask=0.3),
    "confidence": Confidence(Polynomial()),
    "margin": Confidence(Polynomial(), "margin"),
    "threshold": Threshold(0.2),
    "factor": Factor(3.0),
    "entropy_bounded": EntropyBounded(4.0),
}


def architecture(family, tied=False):
    """Return the architecture of a tiny network of a family."""
    grouped = None if family == "gpt2" else 2
    return Architecture(
        family=family,
        width=32,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=grouped,
        max_positions=LENGTH,
        tie_embeddings=tied,
    )


def build(family, mask_id=VOCAB, shift=True, tied=False):
    """Return a denoiser with random weights, and its configuration."""
    config = families.scratch_config(architecture(family, tied), VOCAB + 1, 0, 0)
    denoiser = parallel.build(config, mask_id, shift)
    parallel.materialize(denoiser, torch.device("cpu"))
    parallel.initialize(denoiser, seed=1)
    return denoiser.eval(), config


def stock(denoiser, config, is_causal=True):
    """Return the model of transformers with the denoiser's weights."""
    config = copy.deepcopy(config)
    if not is_causal:
        config.is_causal = False
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(denoiser.network.state_dict())
    return model


def denoiser_of(family, shift=True, mask_id=VOCAB):
    """Return a float64 denoiser whose logits are far from uniform, so that confidence differs between positions."""
    denoiser = build(family, mask_id=mask_id, shift=shift)[0].double().requires_grad_(False)
    head = denoiser.network.get_output_embeddings().weight
    head.mul_(20)
    return denoiser
