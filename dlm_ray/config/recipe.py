"""The recipe: everything that a training run depends on, as an immutable tree that is checked first."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from dlm_ray.config import recipe_checks
from dlm_ray.config.objective import Objective
from dlm_ray.config.parts import ConfigNode, Fraction, NonNegative, Positive
from dlm_ray.config.sampling import Sampling

Family = Literal["gpt2", "llama", "qwen2", "qwen3", "mistral"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Architecture(ConfigNode):
    """A network that is trained from scratch, described in the terms of its Hugging Face family."""

    family: Family = "llama"
    """Hugging Face architecture that the network uses."""
    width: Positive
    """Hidden size D; a multiple of `num_heads`."""
    num_layers: Positive
    """Number of transformer blocks."""
    num_heads: Positive
    """Attention heads per layer; each has `width / num_heads` dimensions."""
    num_key_value_heads: Positive | None = None
    """Key/value heads (grouped-query attention); divides `num_heads`, which is the default. Not for gpt2."""
    intermediate: Positive | None = None
    """Width of the feed-forward layer; by default the family's usual multiple of `width`."""
    max_positions: Positive = 2048
    """Longest sequence in tokens; at least the `sequence_length` of the data."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    zero_head: bool = False
    """Initialize the output head with zeros, so that the first loss is ln V per token (MD4, SEDD, BD3-LM)."""


class Model(ConfigNode):
    """The network: exactly one of `base` (start from its weights) and `architecture` (start from scratch)."""

    base: str | None = None
    """Model to start from: run directory or step directory of dlm_ray, Hugging Face folder, hub name or GGUF file."""
    architecture: Architecture | None = None
    """Network to train from scratch."""
    mask_token: Literal["new"] | NonNegative = "new"
    """`new` appends an embedding row for the mask token; a number reuses that token id (for imported checkpoints)."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """Attention kernel. `auto` takes flash or fused SDPA where the attention mask allows it, else FlexAttention on CUDA
    and dense SDPA on CPU."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about one more forward pass per step."""
    compile: bool = False
    """Compile the network with torch.compile."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Model:
        if self.base is not None and self.architecture is not None:
            raise ValueError(
                "exactly one of model.base and model.architecture is needed, both are set; remove either, such as with "
                "model.base=null"
            )
        if self.base is None and self.architecture is None:
            raise ValueError(
                "model.base is missing and model.architecture, too; set model.base to the model to start from (a run "
                "directory, a Hugging Face folder, a GGUF file or a hub name, such as model.base=gpt2), or "
                "model.architecture"
            )
        return self


class Source(ConfigNode):
    """One folder of training data and its share of the sequences."""

    path: str
    """Folder of shards that `dlm-ray data build` wrote; local, s3:// or gs://."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Relative share of this source in the training sequences."""


class Data(ConfigNode):
    """The sequences that the run is trained on."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Folders of training data, mixed by weight; all built with the same tokenizer and sequence length."""
    window_shards: Positive = 8
    """Sequences are shuffled within a window of this many shards: more mixes better and reads less sequentially."""
    document_mask: bool = True
    """Keep tokens from attending to other documents of their packed sequence."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """What a sequence of a missing or damaged shard does: `fail` ends the run; `skip` trains on padding in its place,
    and checkpoints list what was skipped."""


class Annealing(ConfigNode):
    """How causal attention becomes bidirectional: the visible share of the future grows linearly from 0 to 1."""

    pattern: Literal["bernoulli", "window", "none"] = "none"
    """`bernoulli` reveals each pair of positions independently (DiffuLLaMA); `window` reveals the nearest future first;
    `none` is bidirectional from the first step."""
    steps: NonNegative = 0
    """Length of the annealing in optimizer steps. Set this or `share`."""
    share: Share | None = None
    """Length of the annealing as a share of training.steps, such as 0.3. Set this or `steps`."""

    def num_steps(self, training_steps: int) -> int:
        """Return the length of the annealing in a run of `training_steps`; at least 1 if it is given as a share."""
        return self.steps if self.share is None else max(1, steps_of_share(self.share, training_steps))


class BlockStage(ConfigNode):
    """A stage of the run at one block size."""

    block_tokens: Positive
    """Block size in tokens; divides the sequence length."""
    steps: NonNegative = 0
    """Length of the stage in optimizer steps. Set this or `share`."""
    share: Share | None = None
    """Length of the stage as a share of training.steps, such as 0.2, rounded down. Set this or `steps`."""

    def num_steps(self, training_steps: int) -> int:
        """Return the length of the stage in a run of `training_steps`; 0 for a share of less than one step."""
        return self.steps if self.share is None else steps_of_share(self.share, training_steps)


class ClipSearch(ConfigNode):
    """BD3-LM's clip search (arXiv 2503.09573, section 5.2).

    At regular steps, training switches to the clip interval with the lowest variance of the blocks' bound. The search
    measures blocks of objective.block_tokens, so it starts after the stages of `block_sizes`.
    """

    every_steps: Positive
    """Optimizer steps between two searches; about 5000 in the paper."""
    sequences: Positive = 64
    """Held-out sequences that every candidate interval is measured on."""
    draws: Positive = 4
    """Draws of (t, mask) per sequence."""


class Curriculum(ConfigNode):
    """What changes during training, other than the learning rate."""

    annealing: Annealing = Annealing()
    """How attention becomes bidirectional; with objective.name=block, within each block."""
    block_sizes: tuple[BlockStage, ...] = ()
    """Stages at other block sizes before objective.block_tokens, in order (LLaDA2.0: 1, 4, 32, 64, the whole sequence,
    then down again). Only for objective.name=block."""
    clip_search: ClipSearch | None = None
    """Periodic search for objective.clip; off by default. Only for objective.name=block."""

    def num_staged_steps(self, training_steps: int) -> int:
        """Return the number of steps of all stages of `block_sizes` together in a run of `training_steps`."""
        return sum(stage.num_steps(training_steps) for stage in self.block_sizes)


class Optimizer(ConfigNode):
    """AdamW and its learning-rate schedule."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment."""
    epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's term against division by zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight decay of matrices; embeddings, norms and biases are not decayed."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Global norm that the gradient is clipped to."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up. Set this or `warmup_share`; no warm-up if neither is set."""
    warmup_share: Fraction | None = None
    """Warm-up as a share of training.steps, such as 0.1. Set this or `warmup_steps`."""
    lr_schedule: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    """Learning rate after the warm-up: `cosine` and `linear` fall towards `min_lr_ratio` * `learning_rate` at the end
    of the run, and take no `decay_*`; `warmup_stable_decay` is flat, then falls linearly over `decay_steps` or
    `decay_share`; `constant` stays flat."""
    decay_steps: NonNegative = 0
    """Optimizer steps of the final decay of `warmup_stable_decay`. Set this or `decay_share`."""
    decay_share: Share | None = None
    """Final decay of `warmup_stable_decay` as a share of training.steps. Set this or `decay_steps`."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the end of the schedule, as a share of `learning_rate`."""

    def num_warmup_steps(self, training_steps: int) -> int:
        """Return the length of the warm-up in a run of `training_steps`."""
        return self.warmup_steps if self.warmup_share is None else steps_of_share(self.warmup_share, training_steps)

    def num_decay_steps(self, training_steps: int) -> int:
        """Return the length of the final linear decay in a run of `training_steps`; 0 for `cosine` and `constant`."""
        if self.lr_schedule == "linear":
            return training_steps - self.num_warmup_steps(training_steps)
        return (
            self.decay_steps if self.decay_share is None else max(1, steps_of_share(self.decay_share, training_steps))
        )


class Ema(ConfigNode):
    """The exponential moving average of the weights, which validation, sampling and export use."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9999
    """Decay per optimizer step; step n uses at most (1 + n) / (10 + n), so that short runs average less."""


class Training(ConfigNode):
    """Length of the run, batch sizes and precision."""

    steps: Positive
    """Optimizer steps of the run."""
    global_batch_size: Positive
    """Sequences per optimizer step over all workers; independent of the number of workers."""
    micro_batch_size: Positive
    """Sequences per forward pass of one worker, every draw of a sequence counted; gradients are accumulated."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Type of activations and gathered weights; master weights, EMA and gradient sums are always float32. `auto` is
    bf16 on CUDA devices that support it and fp32 elsewhere; a resumed run keeps the precision that it started with."""
    max_skipped_steps: NonNegative = 0
    """Consecutive steps with a non-finite gradient that are skipped and counted before the run ends with an error.
    Above 0, every step waits for its gradient norm on the host."""


class Validation(ConfigNode):
    """Validation during training: the likelihood bound of held-out sequences at fixed draws."""

    every_steps: Positive = 100
    """Optimizer steps between two validations; the last step is always validated."""
    sequences: NonNegative = 64
    """Held-out sequences; 0 turns validation off."""


class Checkpoint(ConfigNode):
    """When the training state is saved, and which checkpoints are kept."""

    every_steps: Positive = 100
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep_last: Positive = 2
    """Most recent checkpoints to keep."""
    keep_best: NonNegative = 0
    """Checkpoints with the lowest validation nats per token to keep, in addition."""
    keep_every_steps: NonNegative = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 keeps none for that reason."""
    asynchronous: bool = True
    """Copy the state to host memory and write the copy while training continues; false writes it without that copy
    while training waits."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """What a failed save (full disk, unreachable storage) does to the run. The previous checkpoint stays valid, and the
    save at the last step must succeed."""


class Elastic(ConfigNode):
    """A range of workers: the run uses as many as the cluster has room for. Batches and masks do not depend on it."""

    min: Positive
    """Fewest workers; with room for fewer the run waits."""
    max: Positive
    """Most workers."""
    resize_check_seconds: Positive = 60
    """Seconds between two checks for room to grow; growing restarts the workers from the last checkpoint."""


class Parallelism(ConfigNode):
    """The training workers and their resources."""

    workers: Positive | Elastic = 1
    """Number of workers, or a range {min: 1, max: 4}: after a failure the run continues with the workers that are left,
    and grows back."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of every worker; `auto` takes one GPU per worker if the cluster has enough GPUs, else the CPU."""
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 1.0
    """CPUs that Ray reserves per worker, and threads that torch uses in it."""
    max_failures: NonNegative = 3
    """How often a crashed group of workers is restarted from the last checkpoint."""

    @property
    def fewest_workers(self) -> int:
        """Lowest number of workers that the run continues with."""
        return self.workers.min if isinstance(self.workers, Elastic) else self.workers

    @property
    def most_workers(self) -> int:
        """Highest number of workers that the run uses."""
        return self.workers.max if isinstance(self.workers, Elastic) else self.workers


class Tracking(ConfigNode):
    """Logging of metrics. The Weights & Biases credentials come from its own login, never from a recipe."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode."""
    project: str = "dlm_ray"
    """Weights & Biases project."""
    group: str | None = None
    """Weights & Biases group; a sweep puts its trials into a group of its name."""
    log_every_steps: Positive = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    alarm_deviations: Annotated[float, Field(ge=0.0)] = 8.0
    """Warn of a logged loss this many standard deviations above the mean of the previous ones; 0 turns the warning
    off."""


class Recipe(ConfigNode):
    """The configuration of one training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its directory is <name>-<hash of the keys that change the result>."""
    seed: NonNegative = 0
    """Seed of initialization, data order, times and masks; below 2**32."""
    model: Model
    """Network to train."""
    data: Data
    """Training and held-out data."""
    objective: Objective = Objective()
    """Loss to minimize."""
    curriculum: Curriculum = Curriculum()
    """What changes during training."""
    optimizer: Optimizer = Optimizer()
    """Optimizer and learning rate."""
    ema: Ema | None = None
    """Average of the weights; none by default."""
    training: Training
    """Length, batch sizes and precision."""
    validation: Validation = Validation()
    """Validation during training."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    parallelism: Parallelism = Parallelism()
    """Workers."""
    sampling: Sampling = Sampling()
    """Sampling defaults of this run's checkpoints."""
    tracking: Tracking = Tracking()
    """Logging."""

    @field_validator("seed")
    @classmethod
    def _seed_fits(cls, seed: int) -> int:
        if seed >= 2**32:
            raise ValueError("must be below 2**32, because it is one word of a counter-based generator's key")
        return seed

    def contradictions(self) -> list[str]:
        """Return every mistake that involves more than one key, each with its fix; empty if there is none."""
        return recipe_checks.contradictions(self)


def steps_of_share(share: float, training_steps: int) -> int:
    """Return a share of a run in whole steps, rounded down."""
    return int(share * training_steps + 1e-9)  # 0.29 * 100 is a little below 29
