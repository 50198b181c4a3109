"""Load a TextModel from a dlm_ray checkpoint, a Hugging Face folder, a hub name or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

from dlm_ray.checkpoint import huggingface, weights
from dlm_ray.checkpoint.description import KEY, Description
from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.checkpoint.model_files import ModelFiles, fill_with_extra_row
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import UserError
from dlm_ray.config.objective import rules_of
from dlm_ray.data import storage
from dlm_ray.data.identity import TokenizerIdentity
from dlm_ray.data.tokenizer import FastTokenizer, identity, load_tokenizer
from dlm_ray.diffusion import objectives
from dlm_ray.diffusion.denoiser import NetworkFacts, Objective
from dlm_ray.diffusion.objectives.autoregressive import Autoregressive
from dlm_ray.diffusion.objectives.masked import Masked
from dlm_ray.generation.text_model import TextModel
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser
from dlm_ray.models.device import pick_device


def load(
    path: str | Path, weights_kind: str | None = None, *, device: str = "auto", mesh: DeviceMesh | None = None
) -> TextModel:
    """Load a TextModel from a checkpoint.

    Args:
        path: a step directory, a run directory (its last step), a Hugging Face folder, a hub name or a GGUF file.
        weights_kind: `ema` or `raw`; None loads the EMA if the run kept one.
        device: `auto`, `cpu` or `cuda`.
        mesh: the processes that share the network (`serving.sharding`), each of which loads its shard; None if this
            process holds the whole network.

    Raises:
        UserError: if the path is no model, or its objective cannot be restored.
        DamageError: if a file of the checkpoint is damaged.
    """
    checkpoint = weights.our_checkpoint(str(path))
    denoiser = load_network(checkpoint or path, weights_kind, device=device, mesh=mesh)
    if checkpoint is None:
        return _pretrained_model(open_pretrained(str(path)), denoiser)
    manifest = read_manifest(checkpoint)
    description = Description.of(manifest)
    objective = _objective(description, denoiser, checkpoint)
    parameters = dict(objective.named_parameters())
    stored = {name.removeprefix("objective.") for name in manifest.arrays if name.startswith("objective.")}
    if stored != parameters.keys():
        raise UserError(
            f"{checkpoint} stores the parameters {sorted(stored)} of objective.name={description.objective}, but the "
            f"class has {sorted(parameters)}; restore the class that it was trained with"
        )
    weights.load_objective(checkpoint, parameters, weights_kind)
    folder = storage.join(checkpoint.rstrip("/").rpartition("/")[0] or ".", "tokenizer")
    return _text_model(description, denoiser, objective, load_tokenizer(folder), checkpoint)


def load_network(
    path: str | Path, weights_kind: str | None = None, *, device: str = "auto", mesh: DeviceMesh | None = None
) -> HuggingFaceDenoiser:
    """Load only the network, or this process's shard of it; the arguments are those of `load`."""
    target, checkpoint = pick_device(device), weights.our_checkpoint(str(path))
    if checkpoint is not None:
        model = read_manifest(checkpoint).model
        denoiser = _network(model["config"], model["mask_id"], model["shift"], target, mesh)
        weights.load_weights(checkpoint, dict(denoiser.network.named_parameters()), weights=weights_kind)
        return denoiser
    if weights_kind is not None:
        raise UserError(
            f"weights={weights_kind} selects weights of a dlm_ray checkpoint, and {path} is not one; omit it"
        )
    files = open_pretrained(str(path))
    fields = files.config()
    denoiser = _network(fields, fields.get("mask_token_id"), fields.get("shift", True), target, mesh)
    files.load(dict(denoiser.network.named_parameters()))
    return denoiser


def as_unadapted(base: TextModel, pattern: Literal["causal", "bidirectional"], *, seed: int = 0) -> TextModel:
    """Return an autoregressive model as the untrained denoiser that adaptation starts from.

    It has a new mask row and the shift, and attends causally or bidirectionally. Its bound is the baseline for an
    adapted model.
    """
    fields = base.denoiser.network.config.to_dict()
    mask_id = fields["vocab_size"]
    denoiser = _network({**fields, "vocab_size": mask_id + 1}, mask_id, True, base.device)
    weights_of = dict(base.denoiser.network.named_parameters())
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
    """Return the model of an export as its config.json describes it, or else an autoregressive model."""
    folder = files.path
    fields, tokenizer = files.config(), load_tokenizer(str(folder))
    description = Description.of_config(fields, str(folder))
    if description is not None:
        objective = _objective(description, denoiser, str(folder))
        huggingface.load_objective(folder, dict(objective.named_parameters()))
        return _text_model(description, denoiser, objective, tokenizer, str(folder))
    if fields.get("is_causal", True) is False:
        raise UserError(
            f"{folder} is a diffusion model (is_causal is false in its config.json) that does not describe its "
            f"objective: the key {KEY!r}, which `dlm-ray export` writes, is missing; export the checkpoint again with "
            "this version"
        )
    return TextModel(
        denoiser,
        tokenizer,
        identity(tokenizer),
        objective=Autoregressive(),
        sequence_length=denoiser.network.config.max_position_embeddings,
        document_mask=True,
    )


def _text_model(
    description: Description,
    denoiser: HuggingFaceDenoiser,
    objective: Objective,
    tokenizer: FastTokenizer,
    where: str,
) -> TextModel:
    """Return the TextModel of a checkpoint or of its export, which are equal.

    Raises:
        UserError: if the tokenizer is not the one that the model was trained with.
    """
    trained, stored = TokenizerIdentity(**description.tokenizer), identity(tokenizer)
    if stored.sha256 != trained.sha256:
        raise UserError(
            f"{where} was trained with tokenizer {trained.name} (sha256 {trained.sha256[:12]}), but its folder holds "
            f"another one ({stored.sha256[:12]}); restore the first"
        )
    return TextModel(
        denoiser,
        tokenizer,
        trained,
        objective=objective.requires_grad_(False),
        rules=rules_of(objective.kind),
        sampling=description.sampling,
        sequence_length=description.capabilities["sequence_length"],
        document_mask=description.capabilities["document_mask"],
    )


def _objective(description: Description, denoiser: HuggingFaceDenoiser, where: str) -> Objective:
    """Return the objective for scoring and sampling; its own parameters are not loaded yet.

    Raises:
        UserError: if a custom class cannot be imported or restored.
    """
    settings = description.objective_settings(where)
    sequence_length = description.capabilities["sequence_length"]
    facts = NetworkFacts(denoiser.vocab_size, denoiser.embedding.shape[1], sequence_length)
    try:
        return objectives.restore(settings, facts).to(denoiser.embedding.device)
    except ValueError as error:
        raise UserError(f"{where} cannot be restored: {error}") from error


def _network(
    fields: Mapping[str, object], mask_id: int | None, shift: bool, device: torch.device, mesh: DeviceMesh | None = None
) -> HuggingFaceDenoiser:
    denoiser = parallel.build(families.read_config(fields), mask_id, shift).requires_grad_(False)
    if mesh is not None:
        parallel.shard_frozen(denoiser, mesh)
    parallel.materialize(denoiser, device)
    return denoiser
