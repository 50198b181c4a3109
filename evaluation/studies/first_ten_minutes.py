"""Study `first_ten_minutes`: which recipe turns a pretrained AR model into a block diffusion model with few tokens?

Every arm starts from the same pretrained autoregressive (AR) model and takes the same steps on the same sequences, in
bfloat16. The control is the AR model continued on the same tokens: what diffusion costs is the difference to it.

Arms: blocks of 4 as in BD3-LM; a clean half that attends causally, as the base does; an AR loss on that half, which
    needs no pass of its own; blocks that grow from 1 to 2 to 4; a higher learning rate; no shift.
Claims: NBDiff (arXiv 2512.06776): causal context, AR loss on it, growing blocks; SDAR, Efficient-DLM: no shift.
Measured: the bound at blocks of 4 with common draws, and the exact likelihood of the network as an AR model (what the
    adaptation forgot, or learned of the domain).
Command: python -m dlm_ray.evaluation.studies.first_ten_minutes --base MODEL --data FOLDER --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import setup
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Record, Study

from dlm_ray.config.load import read_tree
from dlm_ray.config.paths import folder_argument
from dlm_ray.data.index import load_index
from dlm_ray.diffusion.objectives import Autoregressive
from dlm_ray.generation.loading import load
from dlm_ray.generation.text_model import TextModel
from dlm_ray.training import loop

STEPS, BATCH_SIZE, LEARNING_RATE = 48, 8, 1e-4
HELD_OUT_SEQUENCES, DRAWS_PER_SEQUENCE = 120, 4
UNTOUCHED, CONTROL, PLAIN = "AR base, untouched", "AR base, continued", "blocks"
CAUSAL, WITH_AR_LOSS = "blocks, causal context", "blocks, causal context, AR loss"
GROWING, HIGHER_RATE, NO_SHIFT = f"{WITH_AR_LOSS}, growing", f"{WITH_AR_LOSS}, 3e-4", f"{WITH_AR_LOSS}, no shift"
ORDERINGS = (
    (CAUSAL, PLAIN, "NBDiff: the context attends causally"),
    (WITH_AR_LOSS, CAUSAL, "NBDiff, Nemotron: an AR loss on the clean half"),
    (GROWING, WITH_AR_LOSS, "NBDiff, LLaDA2.0: blocks that grow"),
    (NO_SHIFT, WITH_AR_LOSS, "SDAR, Efficient-DLM: drop the shift"),
    (WITH_AR_LOSS, NO_SHIFT, "DiffuLLaMA: keep the shift"),
)
_BLOCKS: dict[str, Any] = {"name": "block", "block_tokens": 4, "mask_sampler": "count"}
_CAUSAL = {**_BLOCKS, "context": "clean_causal"}
_AR_LOSS = {**_CAUSAL, "autoregressive_weight": 1.0}


def build_study(num_seeds: int, steps: int) -> Study:
    """Return the study; the settings of an arm are its recipe without seed, data and base."""
    grown = [{"block_tokens": 1, "steps": max(1, steps // 8)}, {"block_tokens": 2, "steps": max(1, steps // 4)}]
    arms = {
        UNTOUCHED: {},
        CONTROL: _recipe(steps, {"name": "autoregressive"}),
        PLAIN: _recipe(steps, _BLOCKS),
        CAUSAL: _recipe(steps, _CAUSAL),
        WITH_AR_LOSS: _recipe(steps, _AR_LOSS),
        GROWING: _recipe(steps, _AR_LOSS) | {"curriculum": {"block_sizes": grown}},
        HIGHER_RATE: _recipe(steps, _AR_LOSS, learning_rate=3e-4),
        NO_SHIFT: _recipe(steps, {**_AR_LOSS, "shift": False, "autoregressive_weight": 0.0}),
    }
    return Study(
        name="first_ten_minutes",
        question="From one pretrained AR model, in the same few steps: which recipe of block diffusion comes nearest "
        "to the AR model continued on the same tokens?",
        metric="bits_per_byte",
        unit="bits per byte",
        arms=tuple(Arm(name, settings) for name, settings in arms.items()),
        seeds=tuple(range(num_seeds)),
        baseline=CONTROL,
        orderings=ORDERINGS,
        ratios=("train_seconds",),
    )


def _recipe(steps: int, objective: dict[str, Any], learning_rate: float = LEARNING_RATE) -> dict[str, Any]:
    """Return the recipe of an arm: `adapt` in bfloat16 with small steps, without annealing and averaging."""
    tree = read_tree("adapt")
    tree["objective"] = {"schedule": {"name": "linear"}, "shift": True, **objective}
    tree["curriculum"] = {}
    tree["optimizer"] |= {"learning_rate": learning_rate}
    tree["ema"] = None
    tree["training"] = {
        "steps": steps,
        "global_batch_size": BATCH_SIZE,
        "micro_batch_size": BATCH_SIZE,
        "precision": "bf16",
    }
    tree["validation"] = {"sequences": 0}
    tree["checkpoint"] = {"every_steps": steps, "keep_last": 1}
    tree["tracking"] = {"log_every_steps": 4}
    return tree


def run_arm(arm: Arm, seed: int, folder: Path, data: str, base: str) -> Outcome:
    """Train an arm and score held-out text, as the model samples and as an AR model."""
    details: dict[str, Any] = {}
    if arm.settings:
        result = loop.fit(setup.complete_recipe(arm.settings, arm.name, data, {"base": base}, seed), folder)
        details = {"tokens_per_second": result["tokens_per_second"]}
    model = load(folder) if arm.settings else load(base)
    scored = model.score(data, max_sequences=HELD_OUT_SEQUENCES, draws_per_sequence=DRAWS_PER_SEQUENCE)
    metrics: dict[str, float | None] = {"bits_per_byte": scored.bits_per_byte}
    if not model.is_causal and model.denoiser.shift:
        metrics["bits_per_byte_as_ar"] = (
            as_autoregressive(model).score(data, max_sequences=HELD_OUT_SEQUENCES, draws_per_sequence=1).bits_per_byte
        )
    return setup.scored_outcome(scored, metrics, details)


def as_autoregressive(model: TextModel) -> TextModel:
    """Return an adapted network with shift as the AR model that it still is: causal attention, exact likelihood."""
    return TextModel(
        model.denoiser,
        model.tokenizer,
        model.tokenizer_identity,
        objective=Autoregressive(),
        sequence_length=model.sequence_length,
        document_mask=model.document_mask,
    )


def notes(data: str, base: str, steps: int, records: Sequence[Record]) -> Sequence[str]:
    """Return the report's notes."""
    index = load_index(data)
    as_ar = {
        record.arm: record.metrics["bits_per_byte_as_ar"]
        for record in records
        if "bits_per_byte_as_ar" in record.metrics
    }
    return [
        f"{steps} steps of {BATCH_SIZE} sequences of {index.sequence_length} tokens: "
        f"{steps * BATCH_SIZE * index.sequence_length:,} tokens, in bfloat16. Scored: {HELD_OUT_SEQUENCES} held-out "
        f"sequences, evenly spaced, with {DRAWS_PER_SEQUENCE} draws each. There is one base and one corpus: intervals "
        "are over seeds of the adaptation and over documents.",
        "Exact bits per byte of the adapted networks used as AR models (last seed): "
        + "; ".join(f"{arm} {value:.3f}" for arm, value in as_ar.items())
        + ".",
    ]


def main() -> None:
    """Run the study from the command line."""
    parser = setup.argument_parser("first_ten_minutes", __doc__)
    setup.add_training_arguments(parser, STEPS)
    parser.set_defaults(seeds=2)
    parser.add_argument(
        "--base", required=True, help="a pretrained AR model: Hugging Face folder, hub name or GGUF file"
    )
    parser.add_argument("--data", type=folder_argument, required=True, help="data built with the base's tokenizer")
    arguments = setup.parse_arguments(parser)
    data = str(arguments.data)
    setup.run_and_report(
        build_study(arguments.seeds, arguments.steps),
        lambda arm, seed, folder: run_arm(arm, seed, folder, data, arguments.base),
        arguments.out,
        arguments,
        lambda records: notes(data, arguments.base, arguments.steps, records),
    )


if __name__ == "__main__":
    main()
