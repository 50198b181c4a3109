"""The recipe: everything that one training run depends on, as a frozen tree that is checked before anything starts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from dlm_ray.config.objective import Clip, Objective, Sampling
from dlm_ray.config.parts import ConfigNode, Fraction, NonNegative, Positive

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "mistral")


class Architecture(ConfigNode):
    """A network from scratch, in the terms of its Hugging Face family."""

    family: Literal["gpt2", "llama", "qwen2", "qwen3", "mistral"] = "llama"
    width: Positive
    """Hidden size D."""
    num_layers: Positive
    num_heads: Positive
    num_key_value_heads: Positive | None = None
    """Heads of keys and values (grouped-query attention); as many as `num_heads` if absent. Not for gpt2."""
    intermediate: Positive | None = None
    """Width of the feed-forward layer; the family's usual ratio if absent."""
    max_positions: Positive = 2048
    tie_embeddings: bool = False
    zero_head: bool = False
    """The head begins with zeros, so that the first loss is ln V a token (MD4, SEDD, BD3-LM)."""


class Model(ConfigNode):
    """Where the network comes from: exactly one of `base` and `architecture`."""

    base: str | None = None
    """A checkpoint of ours, a Hugging Face folder, a hub name, or a GGUF file; its weights are the starting point."""
    architecture: Architecture | None = None
    mask_token: Literal["new"] | NonNegative = "new"
    """`new` appends an embedding row; a number reuses that token id (for imported checkpoints)."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """`auto`: flash or fused SDPA where the visibility allows it, FlexAttention on CUDA otherwise, dense SDPA on CPU."""
    activation_checkpointing: bool = False
    compile: bool = False


class Source(ConfigNode):
    """A folder of shards that `dlm-ray data build` wrote, and its share of the rows."""

    path: str
    weight: Annotated[float, Field(gt=0.0)] = 1.0


class Data(ConfigNode):
    """The rows that the run is trained on."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    window_shards: Positive = 8
    """Rows are permuted within a window of so many shards: larger mixes better and reads less sequentially."""
    document_mask: bool = True
    """Packed documents do not see each other."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """A row of a missing or damaged shard ends the run, or is replaced by a row of padding; checkpoints list what was skipped."""


class Annealing(ConfigNode):
    """How causal attention becomes bidirectional: the visible share above the diagonal grows linearly from 0 to 1."""

    pattern: Literal["bernoulli", "window", "none"] = "none"
    """`bernoulli`: each pair alone (DiffuLLaMA); `window`: the nearest future first; `none`: bidirectional at once."""
    steps: NonNegative = 0


class BlockStage(ConfigNode):
    """A part of the run at one block size."""

    block_tokens: Positive
    steps: Positive


class ClipSearch(ConfigNode):
    """BD3-LM's search (arXiv 2503.09573, section 5.2): every so many steps, the clip with the least variance of the blocks' bound is taken.

    It is measured at `objective.block_tokens`, so that it begins when the stages of `block_sizes` are over.
    """

    every_steps: Positive
    """The paper: about 5000."""
    sequences: Positive = 64
    """Held-out rows that every candidate is measured on."""
    draws: Positive = 4
    """Draws of every row."""


class Curriculum(ConfigNode):
    """What changes with the step, other than the learning rate."""

    annealing: Annealing = Annealing()
    """With `block`, of the future within a block."""
    block_sizes: tuple[BlockStage, ...] = ()
    """Of `block`: sizes that come before `objective.block_tokens`, in order (LLaDA2.0: 1, 4, 32, 64, then the row, then down again)."""
    clip_search: ClipSearch | None = None


class Optimizer(ConfigNode):
    """AdamW and its learning rate."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Of matrices; embeddings, norms and biases are not decayed."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    warmup_steps: NonNegative = 0
    lr_schedule: Literal["warmup_stable_decay", "cosine", "constant"] = "cosine"
    decay_steps: NonNegative = 0
    """Of `warmup_stable_decay`: the last so many steps fall linearly to `min_lr_ratio`."""
    min_lr_ratio: Fraction = 0.0
    """The rate at the end, as a share of `learning_rate`."""


class Ema(ConfigNode):
    """The exponential moving average of the weights that evaluation, sampling and export use."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9999


class Training(ConfigNode):
    """How long, and in what portions."""

    steps: Positive
    global_batch_size: Positive
    """Rows of one optimizer step over all workers; the number of workers never changes it."""
    micro_batch_size: Positive
    """Rows of one forward pass of one worker, all draws of a row counted."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of activations and gathered weights; the master weights, EMA and gradients' sums are float32."""
    max_skipped_steps: NonNegative = 0
    """So many steps in a row whose loss or gradient is not finite are left out and counted; one more ends the run. Above 0, the host waits for every
    step's loss and gradient."""


class Validation(ConfigNode):
    """The bound on held-out rows at fixed draws, in the loop."""

    every_steps: Positive = 100
    sequences: NonNegative = 64
    """0 turns validation off."""


class Checkpoint(ConfigNode):
    """When the state is committed, and how much is kept."""

    every_steps: Positive = 100
    keep_last: Positive = 2
    keep_best: NonNegative = 0
    """Also the so many whose held-out rows have the fewest nats a token."""
    keep_every_steps: NonNegative = 0
    """Also every step that is a multiple of it; 0 keeps none for that reason."""
    asynchronous: bool = True
    """Training waits only for a copy of the state in host memory, and the copy is written while it goes on; false needs no such copy."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """What a full disk, or a storage that does not answer, does to the run. The checkpoint before stays; the last step's has to succeed."""


class Elastic(ConfigNode):
    """As many workers as the cluster has room for; the global batch, its rows and its masks are the same with any number."""

    min: Positive
    """With room for fewer the run waits."""
    max: Positive
    resize_check_seconds: Positive = 60
    """How often a running group looks for room to grow into; it goes on from its last checkpoint."""


class Parallelism(ConfigNode):
    """The workers."""

    workers: Positive | Elastic = 1
    """A number, or {min: 1, max: 4}: after a failure the run goes on with what is left, and grows back."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 1.0
    max_failures: NonNegative = 3
    """So many times a crashed group of workers is started again from the last checkpoint."""

    @property
    def fewest_workers(self) -> int:
        """That the run goes on with."""
        return self.workers.min if isinstance(self.workers, Elastic) else self.workers

    @property
    def most_workers(self) -> int:
        """That it ever has."""
        return self.workers.max if isinstance(self.workers, Elastic) else self.workers


class Tracking(ConfigNode):
    """Weights & Biases; credentials come from its own login, never from a recipe."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "dlm_ray"
    group: str | None = None
    """Runs that belong together; a sweep gives its trials its name."""
    log_every_steps: Positive = 10
    alarm_deviations: Annotated[float, Field(ge=0.0)] = 8.0
    """A logged loss so many standard deviations above the mean of those before it is warned of; 0 turns it off."""


class Recipe(ConfigNode):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NonNegative = 0
    model: Model
    data: Data
    objective: Objective = Objective()
    curriculum: Curriculum = Curriculum()
    optimizer: Optimizer = Optimizer()
    ema: Ema | None = None
    training: Training
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    parallelism: Parallelism = Parallelism()
    sampling: Sampling = Sampling()
    tracking: Tracking = Tracking()

    @field_validator("seed")
    @classmethod
    def _seed_fits(cls, seed: int) -> int:
        if seed >= 2**32:
            raise ValueError("must be below 2**32, because it is one word of a counter-based generator's key")
        return seed

    def contradictions(self) -> list[str]:
        """Every mistake that involves more than one key, each with its fix; empty if the recipe is consistent."""
        found = []
        if (self.model.base is None) == (self.model.architecture is None):
            both = "both are set" if self.model.base else "neither is set"
            found.append(
                f"model: exactly one of model.base and model.architecture is needed, {both}; remove or add one"
            )
        architecture = self.model.architecture
        if architecture is not None:
            if architecture.width % architecture.num_heads:
                found.append(
                    f"model.architecture.width={architecture.width} is not divisible by "
                    f"model.architecture.num_heads={architecture.num_heads}; change either"
                )
            if architecture.num_heads % (architecture.num_key_value_heads or architecture.num_heads):
                found.append(
                    f"model.architecture.num_heads={architecture.num_heads} is not a multiple of "
                    f"model.architecture.num_key_value_heads={architecture.num_key_value_heads}; change either"
                )
            if architecture.family == "gpt2" and architecture.num_key_value_heads not in (None, architecture.num_heads):
                found.append(
                    "model.architecture.num_key_value_heads is not for family gpt2, which has no grouped-query attention; remove it"
                )
            if architecture.zero_head and architecture.tie_embeddings:
                found.append(
                    "model.architecture.zero_head=true needs a head of its own, and with tie_embeddings=true it is the embedding; remove either"
                )
        found += self.objective.contradictions(self.model.base is not None) + self.sampling.contradictions(
            self.objective.name
        )
        annealing = self.curriculum.annealing
        if (annealing.pattern == "none") != (annealing.steps == 0):
            found.append(
                f"curriculum.annealing: pattern={annealing.pattern} with steps={annealing.steps}; "
                "set steps > 0 with a pattern, or steps=0 with pattern none"
            )
        if self.objective.name == "autoregressive" and annealing.pattern != "none":
            found.append("curriculum.annealing is not for objective.name=autoregressive, which stays causal; remove it")
        if annealing.steps > self.training.steps:
            found.append(
                f"curriculum.annealing.steps={annealing.steps} exceeds training.steps={self.training.steps}: the model would never "
                "become bidirectional; lower the first"
            )
        found += self._block_contradictions()
        if self.model.attention == "flash" and (annealing.pattern != "none" or self.data.document_mask):
            found.append(
                f"model.attention=flash takes no mask, and curriculum.annealing.pattern={annealing.pattern} with data.document_mask="
                f"{str(self.data.document_mask).lower()} needs one; set model.attention=auto, or pattern none and document_mask false"
            )
        draws = self.objective.draws_of_a_row
        if self.training.micro_batch_size < draws:
            found.append(
                f"training.micro_batch_size={self.training.micro_batch_size} is fewer than the {draws} draws of a row, which are passed together; "
                f"set it to at least {draws}"
            )
        if self.checkpoint.keep_best and (
            not self.validation.sequences or self.checkpoint.every_steps % self.validation.every_steps
        ):
            found.append(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs validation at every checkpoint, with checkpoint.every_steps="
                f"{self.checkpoint.every_steps}, validation.every_steps={self.validation.every_steps} and validation.sequences={self.validation.sequences}; "
                "make the first a multiple of the second, with rows, or leave keep_best out"
            )
        optimizer = self.optimizer
        if (optimizer.lr_schedule == "warmup_stable_decay") != (optimizer.decay_steps > 0):
            found.append(
                f"optimizer.decay_steps={optimizer.decay_steps} with optimizer.lr_schedule={optimizer.lr_schedule}: decay_steps > 0 goes with "
                "warmup_stable_decay and with no other"
            )
        if optimizer.lr_schedule == "constant" and optimizer.min_lr_ratio:
            found.append(
                f"optimizer.min_lr_ratio={optimizer.min_lr_ratio:g} is where a rate falls to, and optimizer.lr_schedule=constant does not fall; remove either"
            )
        if optimizer.warmup_steps + optimizer.decay_steps > self.training.steps:
            found.append(
                f"optimizer.warmup_steps={optimizer.warmup_steps} + optimizer.decay_steps={optimizer.decay_steps} exceed "
                f"training.steps={self.training.steps}; lower either"
            )
        workers = self.parallelism
        if workers.fewest_workers > workers.most_workers:
            found.append(
                f"parallelism.workers: min={workers.fewest_workers} exceeds max={workers.most_workers}; lower the first or raise the second"
            )
        if self.training.global_batch_size < workers.most_workers:
            found.append(
                f"training.global_batch_size={self.training.global_batch_size} is fewer than "
                f"parallelism.workers={workers.most_workers}: a worker would have no row; raise the first or lower the second"
            )
        return found

    def _block_contradictions(self) -> list[str]:
        """Mistakes between block sizes, clips and their curriculum."""
        found = []
        if self.objective.name == "block" and self.model.attention == "flash":
            found.append("model.attention=flash has no mask for blocks; set model.attention=auto")
        objective, stages, search = self.objective, self.curriculum.block_sizes, self.curriculum.clip_search
        if (stages or search) and objective.name != "block":
            key = "block_sizes" if stages else "clip_search"
            return [f"curriculum.{key} is for objective.name=block, and the name is {objective.name}; remove either"]
        staged = sum(stage.steps for stage in stages)
        is_last_at_k = bool(stages) and stages[-1].block_tokens == objective.block_tokens
        if staged > self.training.steps or (staged == self.training.steps and not is_last_at_k):
            found.append(
                f"curriculum.block_sizes take {staged} steps and training.steps is {self.training.steps}: "
                "objective.block_tokens would never be trained; lower the first"
            )
        clip = objective.clip
        if clip is not None and clip.enforce == "counts":
            for size in sorted({stage.block_tokens for stage in stages} | {objective.block_tokens or 0} - {0}):
                if not clip.fits(size):
                    found.append(
                        f"objective.clip [{clip.beta:g}, {clip.omega:g}] with enforce=counts is impossible with blocks of {size}: no whole number of "
                        f"masked tokens is between {clip.beta * size:g} and {clip.omega * size:g}; widen the interval, or set enforce=none"
                    )
        if search is not None:
            # What a clip cannot be combined with, a search for one cannot either.
            has_base = self.model.base is not None
            clipped = objective.model_copy(update={"clip": clip or Clip(beta=0.0, omega=1.0)})
            own = objective.contradictions(has_base)
            found += [
                f"curriculum.clip_search chooses objective.clip, and {mistake}"
                for mistake in clipped.contradictions(has_base)
                if mistake not in own
            ]
            if max(1, -(-staged // search.every_steps)) * search.every_steps >= self.training.steps:
                found.append(
                    f"curriculum.clip_search.every_steps={search.every_steps} with training.steps={self.training.steps}"
                    + (f" and {staged} steps of curriculum.block_sizes" if staged else "")
                    + ": no search would come before the last step; lower the first, or remove it"
                )
        if search is not None and objective.block_tokens == 1:
            found.append(
                "curriculum.clip_search has nothing to search at objective.block_tokens=1, where masking everything "
                "(objective.mask_sampler=count) has no variance left; remove it"
            )
        return found
