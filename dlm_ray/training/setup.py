"""Set up a run: resolve the recipe's network, build it with its objective, and load or initialize the weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from dlm_ray.checkpoint import weights
from dlm_ray.checkpoint.description import KEY
from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import UserError
from dlm_ray.config.manifest_fields import JsonObject, ModelFields
from dlm_ray.config.objective import OBJECTIVES, resolve_settings
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.trees import Tree
from dlm_ray.data.identity import TokenizerIdentity
from dlm_ray.data.index import Index, load_data_tokenizer
from dlm_ray.data.tokenizer import identity, load_tokenizer
from dlm_ray.diffusion import objectives
from dlm_ray.diffusion.denoiser import NetworkFacts, Objective
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser
from dlm_ray.training.step import TrainModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """The network of a run, and its entry in a checkpoint's manifest."""

    config: JsonObject
    """The Hugging Face configuration, the mask token's embedding row included."""
    mask_id: int | None
    shift: bool
    is_causal: bool
    base: str | None = None
    """Checkpoint, folder, hub name or GGUF file whose weights the run starts from; None from scratch or on resume."""
    base_has_mask_row: bool = False

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V: the number of logits. A mask token appended at the end has no logit."""
        rows: int = self.config["vocab_size"]
        return rows - (self.mask_id == rows - 1)

    @property
    def width(self) -> int:
        """Width D of the hidden states."""
        return int(self.config.get("hidden_size") or self.config["n_embd"])

    def as_manifest(self, objective: str) -> ModelFields:
        """Return the fields that a checkpoint's manifest stores; `objective` is the name of the run's objective."""
        return {
            "config": self.config,
            "mask_id": self.mask_id,
            "shift": self.shift,
            "is_causal": self.is_causal,
            "objective": objective,
        }

    @classmethod
    def from_manifest(cls, fields: ModelFields) -> Network:
        """Restore the network from a checkpoint's manifest."""
        return cls(
            config=fields["config"], mask_id=fields["mask_id"], shift=fields["shift"], is_causal=fields["is_causal"]
        )


def resolve(recipe: Recipe, is_causal: bool, tokenizer: TokenizerIdentity) -> Network:
    """Return the network that the recipe names, for data of this tokenizer.

    Raises:
        UserError: if the base has another tokenizer, too few embedding rows, or an unknown family.
    """
    if recipe.model.architecture is not None:
        mask_id = None if is_causal else _mask_id(recipe, tokenizer.vocab_size, tokenizer)
        rows = tokenizer.vocab_size + (mask_id == tokenizer.vocab_size)
        config = families.scratch_config(recipe.model.architecture, rows, tokenizer.start_id, tokenizer.end_id)
        shift = recipe.objective.shift
        return Network(_stored_config(config.to_dict(), recipe, is_causal, mask_id), mask_id, shift, is_causal)
    assert recipe.model.base is not None, "a recipe has a base or an architecture"
    base = recipe.model.base
    fields, base_mask_id, base_identity = describe_base(base)
    if difference := base_identity.differs_from(tokenizer):
        raise UserError(
            f"model.base={base} was made with {difference} as data.sources; build the data with "
            f"tokenizer={base}, or change model.base"
        )
    config = families.read_config(fields)
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.base={base} has {config.vocab_size} embedding rows and its tokenizer has {tokenizer.vocab_size} "
            "tokens; choose another model.base"
        )
    mask_id = base_mask_id
    if mask_id is not None:
        if recipe.model.mask_token not in ("new", mask_id):
            raise UserError(
                f"model.mask_token={recipe.model.mask_token}, but model.base={base} already has the mask token "
                f"{mask_id}; remove model.mask_token"
            )
        _check_mask_id(recipe, mask_id, config.vocab_size, tokenizer, f"the mask token {mask_id} of model.base={base}")
    elif not is_causal:
        mask_id = _mask_id(recipe, config.vocab_size, tokenizer)
    appended = base_mask_id is None and mask_id == config.vocab_size
    config.vocab_size += appended
    shift = recipe.objective.shift
    return Network(
        _stored_config(config.to_dict(), recipe, is_causal, mask_id),
        mask_id,
        shift,
        is_causal,
        base=base,
        base_has_mask_row=not appended,
    )


def check_held_out(recipe: Recipe, indexes: Sequence[Index]) -> None:
    """Check that the sources have held-out sequences where the recipe needs them; warn if validation has none.

    Raises:
        UserError: if the recipe searches a clip or keeps the best checkpoints, and no source has held-out sequences.
    """
    if any(index.splits["held_out"].sequences for index in indexes if "held_out" in index.splits):
        return
    needed_by = (
        "curriculum.clip_search"
        if recipe.curriculum.clip_search
        else "checkpoint.keep_best"
        if recipe.checkpoint.keep_best
        else ""
    )
    if needed_by:
        raise UserError(
            f"{needed_by} measures held-out sequences, and data.sources have none; build the data with a larger "
            "`held_out`, or remove it"
        )
    if recipe.validation.sequences:
        log.warning(
            "validation.sequences=%d, but data.sources have no held-out sequences: validation is skipped",
            recipe.validation.sequences,
        )


def with_precision(recipe: Recipe, device: torch.device, started_with: Tree | None) -> Recipe:
    """Return the recipe with `training.precision: auto` replaced by the precision that the run uses.

    Args:
        recipe: the run.
        device: of this process.
        started_with: the recipe in the checkpoint that the run resumes from, whose precision it keeps; None for a
            new run.
    """
    precision = recipe.training.precision
    if precision == "auto" and started_with is not None:
        precision = started_with["training"]["precision"]
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    if precision == recipe.training.precision:
        return recipe
    log.info("training.precision=auto: %s", precision)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"precision": precision})})


def is_causal(recipe: Recipe) -> bool:
    """Return whether the recipe's objective keeps attention causal.

    Raises:
        UserError: if there is no such objective.
    """
    return objectives.class_of(resolve_settings(recipe.objective.model_dump())).is_causal


def build_objective(recipe: Recipe, network: Network, sequence_length: int) -> Objective:
    """Return the recipe's objective for a network and sequences of `sequence_length` tokens.

    Raises:
        UserError: if a custom class cannot be imported, or settings do not fit the class, the network or the sequences.
    """
    settings = resolve_settings(recipe.objective.model_dump())
    kind = objectives.class_of(settings).kind
    if recipe.objective.name not in OBJECTIVES:
        errors = recipe.objective.errors_of(kind) + recipe.sampling.contradictions(kind)
        if errors:
            raise UserError("\n".join(errors))
    if kind not in ("autoregressive", "ssd_lm"):
        _check_blocks(recipe, sequence_length)
    try:
        objective = objectives.build(settings, NetworkFacts(network.vocab_size, network.width, sequence_length))
    except ValueError as error:
        raise UserError(str(error)) from error
    clip = getattr(getattr(objective, "process", None), "clip", None)
    if clip is not None:
        log.info("clip [%g, %g]: every weight is multiplied with %g", clip.beta, clip.omega, clip.constant)
    return objective


def _check_blocks(recipe: Recipe, sequence_length: int) -> None:
    """Raise UserError unless every block size divides the sequence length."""
    sizes = {"objective.block_tokens": recipe.objective.block_tokens or sequence_length}
    sizes |= {
        f"curriculum.block_sizes.{i}.block_tokens": stage.block_tokens
        for i, stage in enumerate(recipe.curriculum.block_sizes)
    }
    for key, size in sizes.items():
        if sequence_length % size:
            allowed = ", ".join(
                str(number) for number in range(1, sequence_length + 1) if sequence_length % number == 0
            )
            raise UserError(
                f"{key}={size} does not divide the sequence length {sequence_length}; allowed are {allowed}, or build "
                "the data with another `sequence_length`"
            )


def build(
    recipe: Recipe, network: Network, objective: Objective, mesh: DeviceMesh, device: torch.device
) -> tuple[TrainModule, HuggingFaceDenoiser]:
    """Return the sharded root module and its denoiser; memory is allocated, weights are not initialized."""
    denoiser = parallel.build(
        families.read_config(network.config),
        network.mask_id,
        network.shift,
        recipe.model.attention,
        remat=recipe.model.activation_checkpointing,
        compiled=recipe.model.compile,
    )
    root = TrainModule(denoiser, objective.to(device))
    parallel.shard(root, denoiser, mesh, recipe.training.precision, replicated=set(objective.parameters()))
    parallel.materialize(denoiser, device)
    return root, denoiser


def init_weights(recipe: Recipe, network: Network, denoiser: HuggingFaceDenoiser, objective: Objective) -> None:
    """Initialize the weights of a new run: at random, or from the base.

    A base without a mask token gets a new embedding row: the mean of the embeddings plus N(0, 1/D) noise (DiffuGPT).
    Its norm is logged.
    """
    if network.base is None:
        architecture = recipe.model.architecture
        parallel.initialize(denoiser, recipe.seed, zero_head=architecture is not None and architecture.zero_head)
    else:
        extra_rows = set() if network.base_has_mask_row else denoiser.vocabulary_names()
        load_base_weights(network.base, denoiser, extra_rows=extra_rows, seed=recipe.seed)
    if hasattr(objective, "start_from"):
        objective.start_from(parallel.full(denoiser.embedding))


def load_base_weights(base: str, denoiser: HuggingFaceDenoiser, *, extra_rows: set[str], seed: int) -> None:
    """Load the weights of a dlm_ray checkpoint, a Hugging Face folder, a hub name or a GGUF file.

    The tensors named in `extra_rows` get one row more than the base has: the mask token's.
    """
    tensors = dict(denoiser.network.named_parameters())
    checkpoint = weights.our_checkpoint(base)
    if checkpoint is None:
        norms = open_pretrained(base).load(tensors, extra_rows=extra_rows, seed=seed)
    else:
        norms = weights.load_weights(checkpoint, tensors, extra_rows=extra_rows, seed=seed)
    for name, norm in norms.items():
        log.info("new row of %s for the mask token: norm %.3f", name, norm)


def describe_base(base: str) -> tuple[JsonObject, int | None, TokenizerIdentity]:
    """Return the configuration, mask id and tokenizer identity of a base."""
    checkpoint = weights.our_checkpoint(base)
    if checkpoint is not None:
        manifest = read_manifest(checkpoint)
        return manifest.model["config"], manifest.model["mask_id"], TokenizerIdentity(**manifest.tokenizer)
    files = open_pretrained(base)
    fields = files.config()
    return fields, fields.get("mask_token_id"), identity(load_tokenizer(str(files.path)))


def _mask_id(recipe: Recipe, rows: int, tokenizer: TokenizerIdentity) -> int:
    """Return the mask id that the recipe requests: a new row at the end, or an existing token that no text holds."""
    mask_token = recipe.model.mask_token
    if mask_token == "new":
        return rows
    _check_mask_id(recipe, mask_token, rows, tokenizer, f"model.mask_token={mask_token}")
    return mask_token


def _check_mask_id(recipe: Recipe, mask_id: int, rows: int, tokenizer: TokenizerIdentity, name: str) -> None:
    """Raise UserError if the mask id is outside the vocabulary, or is the start, end, padding or unknown token.

    An ordinary token that occurs in the data is found when the data is read (`data.reading.check_ids`).
    """
    allowed = "give the id of a token that no text holds, such as a reserved one, or `new`"
    if not 0 <= mask_id < rows:
        raise UserError(f"{name} is not below the vocabulary's {rows} rows; {allowed}")
    if mask_id >= tokenizer.vocab_size:
        return  # an embedding row that the tokenizer does not use
    data_tokenizer = load_data_tokenizer(recipe.data.sources[0].path)
    roles = {
        "start": tokenizer.start_id,
        "end": tokenizer.end_id,
        "padding": data_tokenizer.pad_token_id,
        "unknown": data_tokenizer.unk_token_id,
    }
    taken = [role for role, token in roles.items() if token == mask_id]
    if taken:
        text = data_tokenizer.convert_ids_to_tokens(mask_id)
        raise UserError(
            f"{name} is the tokenizer's {' and '.join(taken)} token {text!r}, which the data contain; {allowed}"
        )


def _stored_config(fields: JsonObject, recipe: Recipe, is_causal: bool, mask_id: int | None) -> JsonObject:
    """Return the configuration that checkpoints and exports store, from the fields of a network's.

    Of the added keys, stock transformers reads `is_causal` only.
    """
    for unwanted in ("dtype", "_name_or_path", "block_tokens", KEY):
        fields.pop(unwanted, None)
    fields["is_causal"] = is_causal
    if mask_id is not None:
        fields |= {"mask_token_id": mask_id, "shift": recipe.objective.shift}
    if recipe.objective.block_tokens is not None:
        fields["block_tokens"] = recipe.objective.block_tokens
    return fields
