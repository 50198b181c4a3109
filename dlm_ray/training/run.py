"""The components and the state of one run on one rank: data order, network, optimizer, step and cursor."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dlm_ray.checkpoint import agreement, commit, listing
from dlm_ray.checkpoint.manifest import Manifest, read_manifest
from dlm_ray.config.errors import UserError
from dlm_ray.config.manifest_fields import ManifestFields, RunMetrics
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.index import load_data_tokenizer
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import open_sources
from dlm_ray.diffusion.objectives.block import Block
from dlm_ray.diffusion.objectives.masked import Masked
from dlm_ray.models.device import pick_device
from dlm_ray.training import clip_search, guards, setup, state, teacher
from dlm_ray.training import optimizer as optimization
from dlm_ray.training.capabilities import capabilities
from dlm_ray.training.ema import Ema
from dlm_ray.training.faults import Faults
from dlm_ray.training.saving import Saver

log = logging.getLogger(__name__)


class Run:
    """One run on one rank: built from its recipe, or restored from the last checkpoint of its directory.

    Args:
        recipe: the recipe of the run.
        run_dir: the run directory, the same on every rank.
        resources: closes the lock of the run directory and the saver when the run ends.
        patience_seconds: how long to wait for another writer of `run_dir` to end.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, resources: ExitStack, patience_seconds: float):
        self.recipe, self.run_dir = recipe, run_dir
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = _local_device(recipe)
        self.host_group = dist.new_group(backend="gloo")
        self.indexes = open_sources(recipe.data.sources)
        self.sequence_length = self.indexes[0].sequence_length
        setup.check_held_out(recipe, self.indexes)
        self.data_identity = guards.data_identity(self.indexes)
        weights = [source.weight for source in recipe.data.sources]
        self.order = Order(self.indexes, weights, recipe.seed, recipe.data.window_shards)

        def open_directory() -> str | None:
            if self.rank != 0:
                return None
            resources.enter_context(guards.sole_owner(run_dir, "writer", patience_seconds=patience_seconds))
            load_data_tokenizer(recipe.data.sources[0].path).save_pretrained(str(run_dir / "tokenizer"))
            return listing.latest(str(run_dir))

        # Rank 0 decides: the ranks may see different states of the file system, and all must resume from one step.
        self.checkpoint: str | None = agreement.gathered(open_directory, self.host_group)[0]
        """The directory of the last committed checkpoint."""
        self.faults = Faults()
        self.saver = Saver(recipe.checkpoint, run_dir, self.rank)
        resources.callback(self.saver.close)
        self._build()

    def _build(self) -> None:
        """Build the network, the objective and the optimizer, and load the checkpoint or the initial weights."""
        manifest = read_manifest(self.checkpoint) if self.checkpoint else None
        self.recipe = setup.with_precision(self.recipe, self.device, manifest.recipe if manifest else None)
        tokenizer = self.indexes[0].tokenizer
        if manifest is None:
            self.network = setup.resolve(self.recipe, setup.is_causal(self.recipe), tokenizer)
        else:
            self._check_manifest(manifest)
            self.network = setup.Network.from_manifest(manifest.model)
        self.objective = setup.build_objective(self.recipe, self.network, self.sequence_length)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        self.root, denoiser = setup.build(self.recipe, self.network, self.objective, mesh, self.device)
        self.root.train()
        if self.recipe.objective.alignment_weight:
            assert isinstance(self.objective, Masked), "alignment is for masked objectives"
            frozen = teacher.load(self.recipe, mesh, self.device)
            self.objective.auxiliary = replace(self.objective.auxiliary, teacher=frozen)
        if manifest is None:
            setup.init_weights(self.recipe, self.network, denoiser, self.objective)
        self.optimizer = optimization.build(self.recipe.optimizer, self.root)
        self.ema = Ema(self.root, self.recipe.ema.decay) if self.recipe.ema else None
        self.step, self.cursor = 0, Cursor.start(len(self.indexes))
        self.clip: tuple[float, float] | None = None
        """[beta, omega] of the last clip search."""
        if manifest is not None:
            self._restore(manifest)

    def _check_manifest(self, manifest: Manifest) -> None:
        """Raise UserError if the checkpoint belongs to another tokenizer, recipe or data."""
        tokenizer = self.indexes[0].tokenizer
        if manifest.tokenizer["sha256"] != tokenizer.sha256:
            raise UserError(
                f"{self.checkpoint} was trained with tokenizer {manifest.tokenizer['name']} "
                f"({manifest.tokenizer['sha256'][:12]}), but data.sources use {tokenizer.name} "
                f"({tokenizer.sha256[:12]}); set data.sources to the data of this run"
            )
        checkpoint_data = manifest.extra.get("data", self.data_identity)
        guards.check_same_run(self.recipe, self.data_identity, str(self.checkpoint), manifest.recipe, checkpoint_data)

    def _restore(self, manifest: Manifest) -> None:
        """Load tensors and counters of `self.checkpoint`; damage that one rank finds raises on every rank."""
        checkpoint = str(self.checkpoint)

        def load() -> None:
            commit.load(checkpoint, self.tensors())

        agreement.gathered(load, self.host_group)
        self.faults = Faults(**manifest.extra.get("faults", {}))
        optimization.set_step(self.optimizer, manifest.step - self.faults.skipped_steps)
        self.step, self.cursor = manifest.step, Cursor.from_dict(manifest.cursor)
        if clip := manifest.extra.get("clip"):
            assert isinstance(self.objective, Block), "only block objectives search a clip"
            self.clip = clip_search.apply(self.recipe, self.objective, clip)
        log.info("resumed from %s", checkpoint)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the run by its name in a checkpoint."""
        return state.tensors(self.root, self.optimizer, self.ema)

    def manifest_fields(self, metrics: RunMetrics) -> ManifestFields:
        """Return the fields of the manifest of the current step."""
        return {
            "step": self.step,
            "recipe": self.recipe.model_dump(mode="json"),
            "tokenizer": self.indexes[0].tokenizer.as_dict(),
            "model": self.network.as_manifest(self.recipe.objective.name),
            "capabilities": capabilities(self.recipe, self.objective, self.sequence_length),
            "cursor": self.cursor.as_dict(),
            "extra": {
                "metrics": metrics,
                "faults": self.faults.as_dict(),
                "data": self.data_identity,
                "clip": self.clip,
            },
        }


@contextmanager
def process_group(recipe: Recipe) -> Iterator[None]:
    """Use the existing process group (Ray Train's), or create one for the context: torchrun's, or a single process."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if _local_device(recipe).type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _local_device(recipe: Recipe) -> torch.device:
    """Return the device of this rank, and make it the current CUDA device; the local rank selects among several."""
    device = pick_device(recipe.parallelism.device, "parallelism.device")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device
