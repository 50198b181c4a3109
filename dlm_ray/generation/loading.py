"""A TextModel from a checkpoint of ours, from a Hugging Face folder or a GGUF file, or from an AR model that was never adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

from dlm_ray.checkpoint import commit, weights
from dlm_ray.checkpoint.commit import Manifest
from dlm_ray.checkpoint.model_files import ModelFiles, fill_with_extra_row
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import UserError
from dlm_ray.config.objective import Sampling, rules_of
from dlm_ray.data.tokenizer import TokenizerIdentity, identity, load_tokenizer
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.objectives import Autoregressive, Block, GenMD4, Masked, Sedd, SsdLm
from dlm_ray.generation.text_model import TextModel
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser


def load(
    path: str | Path, weights_kind: str | None = None, *, device: str = "auto", mesh: DeviceMesh | None = None
) -> TextModel:
    """A TextModel from a step directory of ours, a run directory (its last step), a Hugging Face folder, a hub name or a GGUF file.

    Args:
        path: the checkpoint.
        weights_kind: `ema`, `raw`, or None: the average if the run kept one.
        device: auto, cpu or cuda.
        mesh: of the processes that hold the network together (`serving.sharding`), each of which loads its part; None for this one alone.
    """
    checkpoint = weights.our_checkpoint(str(path))
    denoiser = load_network(checkpoint or path, weights_kind, device=device, mesh=mesh)
    if checkpoint is None:
        return _pretrained_model(open_pretrained(str(path)), denoiser)
    manifest = commit.read_manifest(checkpoint)
    name = manifest.model["objective"]
    objective = _objective(manifest, denoiser).to(pick_device(device))
    weights.load_objective(checkpoint, dict(objective.named_parameters()), weights_kind)
    return TextModel(
        denoiser,
        load_tokenizer(str(Path(checkpoint).parent / "tokenizer")),
        TokenizerIdentity(**manifest.tokenizer),
        objective=objective.requires_grad_(False),
        rules=rules_of(name),
        sampling=Sampling(**manifest.recipe.get("sampling", {})),
        sequence_length=manifest.capabilities["sequence_length"],
        document_mask=manifest.capabilities["document_mask"],
    )


def load_network(
    path: str | Path, weights_kind: str | None = None, *, device: str = "auto", mesh: DeviceMesh | None = None
) -> HuggingFaceDenoiser:
    """The network alone, or this process's part of it, as `load` takes it."""
    on, checkpoint = pick_device(device), weights.our_checkpoint(str(path))
    if checkpoint is not None:
        model = commit.read_manifest(checkpoint).model
        denoiser = _network(model["config"], model["mask_id"], model["shift"], on, mesh)
        weights.load_weights(checkpoint, dict(denoiser.network.named_parameters()), weights=weights_kind)
        return denoiser
    if weights_kind is not None:
        raise UserError(
            f"--weights {weights_kind} chooses between the weights of a checkpoint of ours, and {path} is none; leave it out"
        )
    files = open_pretrained(str(path))
    fields = files.config()
    denoiser = _network(fields, fields.get("mask_token_id"), fields.get("shift", True), on, mesh)
    files.load(dict(denoiser.network.named_parameters()))
    return denoiser


def pick_device(device: str) -> torch.device:
    """What auto, cpu or cuda means here."""
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def as_unadapted(base: TextModel, pattern: Literal["causal", "bidirectional"], *, seed: int = 0) -> TextModel:
    """An autoregressive model as the denoiser that adaptation starts from: with a new mask row and the shift, and no training.

    The baseline that says what adaptation itself is worth, seeing only the past (as it was trained to) or everything.
    """
    own = base.denoiser
    fields = own.network.config.to_dict()
    mask_id = fields["vocab_size"]
    denoiser = _network({**fields, "vocab_size": mask_id + 1}, mask_id, True, base.device)
    weights_of = dict(own.network.named_parameters())
    for name, parameter in denoiser.network.named_parameters():
        if name in denoiser.vocabulary_names():
            fill_with_extra_row(parameter, weights_of[name], name, seed)
        else:
            parameter.copy_(weights_of[name])
    return TextModel(
        denoiser,
        base.tokenizer,
        base.tokenizer_identity,
        objective=Masked(),
        sequence_length=base.sequence_length,
        document_mask=base.document_mask,
        pattern=pattern,
    )


def _pretrained_model(files: ModelFiles, denoiser: HuggingFaceDenoiser) -> TextModel:
    tokenizer = load_tokenizer(str(files.path))
    return TextModel(
        denoiser,
        tokenizer,
        identity(tokenizer),
        objective=_huggingface_objective(files.config()),
        sequence_length=denoiser.network.config.max_position_embeddings,
        document_mask=True,
    )


def _huggingface_objective(fields: dict[str, Any]) -> Any:
    """What a config.json says: autoregressive, unless an export of ours says otherwise."""
    if fields.get("is_causal", True) is not False:
        return Autoregressive()
    return Block(block_tokens=fields["block_tokens"]) if fields.get("block_tokens") else Masked()


def _objective(manifest: Manifest, denoiser: HuggingFaceDenoiser) -> Any:
    """What scores the checkpoint's text and says how it is sampled: the bound over the full range, whatever training did to its noise.

    D3PM and tauLDR are bounded by MD4's form of the same integral.
    """
    name = manifest.model["objective"]
    if manifest.model["is_causal"]:
        return Autoregressive()
    if name == "block":
        return Block(block_tokens=manifest.capabilities["block_tokens"])
    if name == "genmd4":
        is_scalar = manifest.arrays["objective.theta"].shape == (1,)
        return GenMD4(Absorbing(), denoiser.vocab_size, scalar=is_scalar)
    if name == "sedd":
        return Sedd(vocab_size=denoiser.vocab_size)
    if name == "ssd_lm":
        return SsdLm(
            denoiser.vocab_size, denoiser.embedding.shape[1], **(manifest.recipe["objective"]["simplex"] or {})
        )
    return Masked()


def _network(
    fields: dict[str, Any], mask_id: int | None, shift: bool, device: torch.device, mesh: DeviceMesh | None = None
) -> HuggingFaceDenoiser:
    denoiser = parallel.build(families.read_config(fields), mask_id, shift).requires_grad_(False)
    if mesh is not None:
        parallel.shard_frozen(denoiser, mesh)
    parallel.materialize(denoiser, device)
    return denoiser
