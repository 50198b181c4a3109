"""Checks of a recipe that involve more than one key; each message has the values and the key to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlm_ray.config.objective import Clip

if TYPE_CHECKING:
    from dlm_ray.config.recipe import Annealing, Architecture, Optimizer, Recipe


def contradictions(recipe: Recipe) -> list[str]:
    """Return every mistake that involves more than one key, each with its fix; empty if there is none."""
    return [
        *(_architecture(recipe.model.architecture) if recipe.model.architecture is not None else []),
        *recipe.objective.contradictions(recipe.model.base is not None),
        *recipe.sampling.contradictions(recipe.objective.name),
        *_annealing(recipe, recipe.curriculum.annealing),
        *_blocks(recipe),
        *_clip_search(recipe),
        *_flash(recipe),
        *_micro_batch(recipe),
        *_keep_best(recipe),
        *_learning_rate(recipe.optimizer, recipe.training.steps),
        *_workers(recipe),
    ]


def _architecture(architecture: Architecture) -> list[str]:
    problems = []
    if architecture.width % architecture.num_heads:
        problems.append(
            f"model.architecture.width={architecture.width} is not divisible by "
            f"model.architecture.num_heads={architecture.num_heads}; change either"
        )
    if architecture.num_heads % (architecture.num_key_value_heads or architecture.num_heads):
        problems.append(
            f"model.architecture.num_heads={architecture.num_heads} is not a multiple of "
            f"model.architecture.num_key_value_heads={architecture.num_key_value_heads}; change either"
        )
    if architecture.family == "gpt2" and architecture.num_key_value_heads not in (None, architecture.num_heads):
        problems.append(
            "model.architecture.num_key_value_heads is not for family gpt2, which has no grouped-query attention; "
            "remove it"
        )
    if architecture.zero_head and architecture.tie_embeddings:
        problems.append(
            "model.architecture.zero_head=true needs a head of its own, and with tie_embeddings=true the head is the "
            "embedding; remove either"
        )
    return problems


def _both(steps_key: str, steps: int, share_key: str, share: float | None) -> list[str]:
    """Return a mistake if a length is given in steps and as a share."""
    if not steps or share is None:
        return []
    return [f"{steps_key}={steps} and {share_key}={share:g} are both set; remove either, such as with {share_key}=null"]


def _annealing(recipe: Recipe, annealing: Annealing) -> list[str]:
    problems = _both("curriculum.annealing.steps", annealing.steps, "curriculum.annealing.share", annealing.share)
    num_steps = annealing.num_steps(recipe.training.steps)
    if (annealing.pattern == "none") != (num_steps == 0):
        problems.append(
            f"curriculum.annealing: pattern={annealing.pattern} with steps={annealing.steps} and "
            f"share={annealing.share}; set steps > 0 with a pattern, or a share, and neither with pattern none"
        )
    if recipe.objective.name == "autoregressive" and annealing.pattern != "none":
        problems.append("curriculum.annealing is not for objective.name=autoregressive, which stays causal; remove it")
    if annealing.share is None and num_steps > recipe.training.steps:
        problems.append(
            f"curriculum.annealing.steps={num_steps} exceeds training.steps={recipe.training.steps}: the model would "
            "never become bidirectional; lower the first, or give curriculum.annealing.share instead"
        )
    return problems


def _blocks(recipe: Recipe) -> list[str]:
    """Check block sizes, their stages and the clip."""
    problems = []
    objective, stages = recipe.objective, recipe.curriculum.block_sizes
    if objective.name == "block" and recipe.model.attention == "flash":
        problems.append("model.attention=flash has no mask for blocks; set model.attention=auto")
    if stages and objective.name != "block":
        problems.append(
            f"curriculum.block_sizes is for objective.name=block, and the name is {objective.name}; remove either"
        )
        return problems
    for number, stage in enumerate(stages):
        key = f"curriculum.block_sizes.{number}"
        problems += _both(f"{key}.steps", stage.steps, f"{key}.share", stage.share)
        if not stage.steps and stage.share is None:
            problems.append(
                f"{key} has no length; set {key}.steps to optimizer steps, or {key}.share to a share of training.steps"
            )
    total = recipe.curriculum.num_staged_steps(recipe.training.steps)
    ends_at_trained_size = bool(stages) and stages[-1].block_tokens == objective.block_tokens
    if total > recipe.training.steps or (total == recipe.training.steps and not ends_at_trained_size):
        problems.append(
            f"curriculum.block_sizes take {total} steps and training.steps is {recipe.training.steps}: "
            "objective.block_tokens would never be trained; lower the first"
        )
    clip = objective.clip
    if clip is not None and clip.enforce == "counts":
        for size in sorted({stage.block_tokens for stage in stages} | {objective.block_tokens or 0} - {0}):
            if not clip.fits(size):
                problems.append(
                    f"objective.clip [{clip.beta:g}, {clip.omega:g}] with enforce=counts is impossible with blocks of "
                    f"{size}: no whole number of masked tokens is between {clip.beta * size:g} and "
                    f"{clip.omega * size:g}; widen the interval, or set enforce=none"
                )
    return problems


def _clip_search(recipe: Recipe) -> list[str]:
    objective = recipe.objective
    search = recipe.curriculum.clip_search
    if search is None:
        return []
    if objective.name != "block":
        name = objective.name
        return [f"curriculum.clip_search is for objective.name=block, and the name is {name}; remove either"]
    # A search cannot be combined with what a clip cannot be combined with.
    has_base = recipe.model.base is not None
    clipped = objective.model_copy(update={"clip": objective.clip or Clip(beta=0.0, omega=1.0)})
    without = objective.contradictions(has_base)
    problems = [
        f"curriculum.clip_search chooses objective.clip, and {problem}"
        for problem in clipped.contradictions(has_base)
        if problem not in without
    ]
    staged = recipe.curriculum.num_staged_steps(recipe.training.steps)
    first = max(1, -(-staged // search.every_steps)) * search.every_steps
    if first >= recipe.training.steps:
        problems.append(
            f"curriculum.clip_search.every_steps={search.every_steps} with training.steps={recipe.training.steps}"
            + (f" and {staged} steps of curriculum.block_sizes" if staged else "")
            + ": no search would come before the last step; lower the first, or remove it"
        )
    if objective.block_tokens == 1:
        problems.append(
            "curriculum.clip_search has nothing to search at objective.block_tokens=1, where masking everything "
            "(objective.mask_sampler=count) has no variance left; remove it"
        )
    return problems


def _flash(recipe: Recipe) -> list[str]:
    pattern, document_mask = recipe.curriculum.annealing.pattern, recipe.data.document_mask
    if recipe.model.attention != "flash" or (pattern == "none" and not document_mask):
        return []
    return [
        f"model.attention=flash takes no mask, and curriculum.annealing.pattern={pattern} with "
        f"data.document_mask={str(document_mask).lower()} needs one; set model.attention=auto, or pattern none and "
        "document_mask false"
    ]


def _micro_batch(recipe: Recipe) -> list[str]:
    size, draws = recipe.training.micro_batch_size, recipe.objective.draws_of_a_row
    if size >= draws:
        return []
    return [
        f"training.micro_batch_size={size} is fewer than the {draws} draws of a sequence, which share a forward pass; "
        f"set it to at least {draws}"
    ]


def _keep_best(recipe: Recipe) -> list[str]:
    checkpoint, validation = recipe.checkpoint, recipe.validation
    is_validated = validation.sequences and checkpoint.every_steps % validation.every_steps == 0
    if not checkpoint.keep_best or is_validated:
        return []
    return [
        f"checkpoint.keep_best={checkpoint.keep_best} needs validation at every checkpoint, with "
        f"checkpoint.every_steps={checkpoint.every_steps}, validation.every_steps={validation.every_steps} and "
        f"validation.sequences={validation.sequences}; make the first a multiple of the second and the third positive, "
        "or remove keep_best"
    ]


def _learning_rate(optimizer: Optimizer, training_steps: int) -> list[str]:
    problems = [
        *_both("optimizer.warmup_steps", optimizer.warmup_steps, "optimizer.warmup_share", optimizer.warmup_share),
        *_both("optimizer.decay_steps", optimizer.decay_steps, "optimizer.decay_share", optimizer.decay_share),
    ]
    has_decay = optimizer.decay_steps > 0 or optimizer.decay_share is not None
    if (optimizer.lr_schedule == "warmup_stable_decay") != has_decay:
        problems.append(
            f"optimizer.decay_steps={optimizer.decay_steps} and optimizer.decay_share={optimizer.decay_share} with "
            f"optimizer.lr_schedule={optimizer.lr_schedule}: warmup_stable_decay needs one of them, and the other "
            "schedules have neither"
        )
    if optimizer.warmup_share is not None and (optimizer.decay_share or 0.0) + optimizer.warmup_share > 1.0:
        problems.append(
            f"optimizer.warmup_share={optimizer.warmup_share:g} + optimizer.decay_share={optimizer.decay_share:g} "
            "exceed 1; lower either"
        )
        return problems
    if optimizer.lr_schedule == "constant" and optimizer.min_lr_ratio:
        problems.append(
            f"optimizer.min_lr_ratio={optimizer.min_lr_ratio:g} is where the rate falls to, and "
            "optimizer.lr_schedule=constant does not fall; remove either"
        )
    warmup = optimizer.num_warmup_steps(training_steps)
    decay = optimizer.num_decay_steps(training_steps) if has_decay else 0
    if warmup + decay > training_steps:
        problems.append(
            f"optimizer.warmup_steps={warmup} + optimizer.decay_steps={decay} exceed training.steps={training_steps}; "
            "lower either, or give shares instead (optimizer.warmup_share, optimizer.decay_share)"
        )
    return problems


def _workers(recipe: Recipe) -> list[str]:
    parallelism, problems = recipe.parallelism, []
    if parallelism.fewest_workers > parallelism.most_workers:
        problems.append(
            f"parallelism.workers: min={parallelism.fewest_workers} exceeds max={parallelism.most_workers}; lower the "
            "first or raise the second"
        )
    if recipe.training.global_batch_size < parallelism.most_workers:
        problems.append(
            f"training.global_batch_size={recipe.training.global_batch_size} is fewer than "
            f"parallelism.workers={parallelism.most_workers}: a worker would have no sequence; raise the first or "
            "lower the second"
        )
    return problems
