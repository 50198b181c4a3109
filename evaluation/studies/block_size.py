"""Study `block_size`: what does a smaller block gain, and what do clips, contexts and training from scratch change?

One base, masked diffusion over whole sequences, is fine-tuned to ever smaller blocks with the same number of steps.

Arms: blocks of 128 (the whole sequence), 16, 8, 4 and 1 tokens; blocks of 16 and 4 with a clip; blocks of 4 that see
only x_t; blocks of 1 with everything masked or with the loss of a random part; blocks of 4 and an autoregressive (AR)
model from scratch.
Claims: BD3-LM's Tables 1, 2, 3 and 8 and its review: the likelihood improves as the block shrinks, and clips and x_0
as context help.
Measured: the bound over the full range of t with counted masks, which for blocks of 1 is the exact likelihood.
Command: python -m dlm_ray.evaluation.studies.block_size --out DIR

Text, network and optimizer are those of the study `objectives`. The base is an AR model that was adapted to masked
diffusion. An arm from scratch takes as many steps as both bases and the fine-tuning together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import setup
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Record, Study
from dlm_ray.evaluation.sweeps import clip_search

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.recipe import Recipe
from dlm_ray.generation.loading import load
from dlm_ray.training import loop

WHOLE_SEQUENCE_STEPS, STEPS = 300, 150
"""Steps of the base, from the AR model, and of every fine-tuned arm."""
SEARCHED_SIZES = (4, 8, 16, 32, 64, 128)
_BASE_SEED = 1000


def _block(size: int, **keys: Any) -> JsonObject:
    return {"name": "block", "block_tokens": size, **keys}


def _clip(beta: float, omega: float) -> JsonObject:
    return {"beta": beta, "omega": omega, "weight": "paper", "enforce": "counts"}


# The published figures are test perplexities on One Billion Words. Names are those of the committed results, where
# "row" is a sequence.
ARMS = (
    Arm("row (128)", {"objective": _block(128)}, "31.78"),
    Arm("16", {"objective": _block(16)}, "31.33"),
    Arm("16, clip 0.3-0.8", {"objective": _block(16, clip=_clip(0.3, 0.8))}, "31.19"),
    Arm("8", {"objective": _block(8)}),
    Arm("4", {"objective": _block(4)}, "29.23"),
    Arm("4, clip 0.45-0.95", {"objective": _block(4, clip=_clip(0.45, 0.95))}, "29.21 (of 30.18, 3B tokens)"),
    Arm("4, x_t only", {"objective": _block(4, context="noisy")}, "73.2 (of 29.2, 50K steps)"),
    Arm("1, linear", {"objective": _block(1)}, "<= 25.56"),
    Arm("1, all masked", {"objective": _block(1, mask_sampler="count")}, "22.88"),
    Arm("1, random batch size", {"objective": _block(1, weight="flat", normalize_by="global_masked")}, "24.37"),
    Arm("4, from scratch", {"objective": _block(4), "from": "scratch"}, "26.99 (of 28.33)"),
    Arm("AR, from scratch", {"objective": {"name": "autoregressive"}, "from": "scratch"}, "22.83"),
)
ORDERINGS = (
    ("1, all masked", "4", "Table 3: likelihood falls with the block"),
    ("4", "8", "Table 3"),
    ("8", "16", "Table 3"),
    ("16", "row (128)", "Table 3"),
    ("1, all masked", "1, linear", "Table 1"),
    ("1, all masked", "1, random batch size", "Table 1"),
    ("4, clip 0.45-0.95", "4", "Table 8"),
    ("16, clip 0.3-0.8", "16", "Table 2"),
    ("4", "4, x_t only", "the review thread"),
    ("4, from scratch", "4", "the review thread"),
    ("AR, from scratch", "4", "Table 3"),
)


def build_study(num_seeds: int, steps: int) -> Study:
    """Return the study; the settings of an arm are its recipe without seed, data and base."""
    return Study(
        name="block_size",
        question="One base over whole sequences, fine-tuned to smaller blocks: what does the size of a block cost, and "
        "what do clips and contexts do?",
        metric="bits_per_character",
        unit="bits per character",
        arms=tuple(replace(arm, settings=_settings(arm, steps)) for arm in ARMS),
        seeds=tuple(range(num_seeds)),
        baseline="row (128)",
        orderings=ORDERINGS,
        ratios=("train_seconds", "nelbo_variance", "gradient_variance"),
    )


def _settings(arm: Arm, steps: int) -> JsonObject:
    """Return the recipe of an arm, and in "from" where its weights come from."""
    is_from_scratch = arm.settings.get("from") == "scratch"
    tree = setup.recipe_tree(dict(arm.settings["objective"]), _scratch_steps(steps) if is_from_scratch else steps)
    return {**tree, "from": "scratch" if is_from_scratch else "the base"}


def _scratch_steps(steps: int) -> int:
    """Return the steps of an arm from scratch: those of both bases and of the fine-tuning."""
    return setup.BASE_STEPS + WHOLE_SEQUENCE_STEPS + steps


def arm_recipe(arm: Arm, seed: int, data: str, base: str) -> Recipe:
    """Return the recipe of a run."""
    tree = {name: value for name, value in arm.settings.items() if name != "from"}
    model = {"base": base}
    if arm.settings["from"] == "scratch":
        model = setup.base_recipe(data).model.model_dump()
    return setup.complete_recipe(tree, arm.name, data, model, seed)


def whole_sequence_base(data: str, ar_base: str, folder: Path) -> str:
    """Adapt the AR model to masked diffusion over whole sequences, and return the run directory of this base."""
    tree = setup.recipe_tree({"name": "masked"}, WHOLE_SEQUENCE_STEPS)
    loop.fit(setup.complete_recipe(tree, "the base", data, {"base": ar_base}, _BASE_SEED), folder)
    return str(folder)


def run_arm(arm: Arm, seed: int, folder: Path, data: str, base: str) -> Outcome:
    """Train an arm, score held-out text, and measure the variances of the objective as it was trained."""
    run = setup.train(arm_recipe(arm, seed, data, base), folder)
    scored = run.score(data)
    metrics = {
        "bits_per_character": scored.bits_per_byte,
        "train_seconds": run.seconds,
        **run.variances(data),
    }
    return setup.scored_outcome(scored, metrics, {"steps": run.result["step"]})


def search_clips(base: str, data: str, out: Path, num_sequences: int = 64, num_draws: int = 4) -> list[str]:
    """Search the clip of every block size on the base, unless `out` has it, and return the lines for the report.

    Each search writes a table and a heat map into `out`/clips_<size>.
    """
    model = load(base)
    lines, middles = [], []
    for size in SEARCHED_SIZES:
        folder = out / f"clips_{size}"
        if not (folder / "clip_search.json").exists():
            candidates = clip_search.search(model, data, size, num_sequences=num_sequences, num_draws=num_draws)
            about = {
                "checkpoint": "the base of the study block_size",
                "block_tokens": size,
                "rows": num_sequences,
                "draws": num_draws,
            }
            clip_search.write(candidates, folder, about)
        fields = json.loads((folder / "clip_search.json").read_text())["candidates"]
        best, full_range = fields[0], next(one for one in fields if one["omega"] - one["beta"] > 0.95)
        middles.append((best["beta"] + best["omega"]) / 2)
        lines.append(
            f"Clip search on the base, blocks of {size}: [{best['beta']:g}, {best['omega']:g}], variance "
            f"{best['variance']:.3g} (full range {full_range['variance']:.3g}); {best['masked_tokens']:.2f} masked "
            f"tokens per block (full range {full_range['masked_tokens']:.2f})."
        )
    return [*lines, clip_verdict(middles)]


def clip_verdict(middles: Sequence[float]) -> str:
    """Return whether smaller blocks chose heavier masking, from the middles of the best clips of SEARCHED_SIZES."""
    order = ", ".join(f"{size}: {middle:.3g}" for size, middle in zip(SEARCHED_SIZES, middles, strict=True))
    if middles[0] <= middles[-1]:
        verdict = "did not hold: the smallest blocks chose no heavier masking than the whole sequence"
    elif all(small >= large for small, large in zip(middles, middles[1:], strict=False)):
        verdict = "held"
    else:
        verdict = "held between the ends, not at every step"
    finding = "The paper's finding that smaller blocks need heavier masking"
    return f"The middle of the best clip by block size: {order}. {finding} {verdict}."


def notes(corpus: Mapping[str, Any], steps: int) -> list[str]:
    """Return the report's notes."""
    return [
        f"Text, network and optimizer are those of the study `objectives`: {corpus['documents']} documents, "
        f"{corpus['characters']:,} characters (sha256 of the source {corpus['sha256'][:12]}); {setup.BATCH_SIZE} "
        f"sequences of {setup.SEQUENCE_LENGTH} characters per step. In the arms' names a row is a whole sequence.",
        f"The base is an AR model ({setup.BASE_STEPS} steps), adapted with shift to masked diffusion over whole "
        f"sequences ({WHOLE_SEQUENCE_STEPS} steps). Every arm takes {steps} steps from there, and from scratch "
        f"{_scratch_steps(steps)}. The papers' base and arms have no shift and no AR model before them.",
        "With shift, blocks of 1 with everything masked are the AR model: that arm turns the base back into one.",
        "Published: test perplexities on One Billion Words (BD3-LM's Tables 1, 2, 3 and 8 and its review), with "
        "different budgets; only their order is compared with ours. Bits here are per character.",
        "`1, random batch size` is the AR loss of a random half of the tokens of every batch. The arms with a clip "
        "are scored over the full range.",
        "Variances are of each arm's own training loss over draws of t and masks, on one batch at the end of "
        "training. The clipped losses and that of `4, x_t only` estimate something other than the bound.",
        "Run times are rough, because the machine had other work; `python -m dlm_ray.evaluation.speed train` "
        "measures steps interleaved.",
    ]


def main() -> None:
    """Run the study from the command line."""
    parser = setup.argument_parser("block_size", __doc__)
    setup.add_training_arguments(parser, STEPS)
    arguments = setup.parse_arguments(parser)
    study = build_study(arguments.seeds, arguments.steps)
    corpus, data, ar_base = setup.prepare(arguments.out)
    base = whole_sequence_base(data, ar_base, arguments.out / "whole_sequence_base")
    clip_lines = search_clips(base, data, arguments.results or arguments.out)

    def report_notes(records: Sequence[Record]) -> list[str]:
        return [*notes(corpus, arguments.steps), *clip_lines]

    setup.run_and_report(
        study,
        lambda arm, seed, folder: run_arm(arm, seed, folder, data, base),
        arguments.out,
        arguments,
        report_notes,
    )


if __name__ == "__main__":
    main()
