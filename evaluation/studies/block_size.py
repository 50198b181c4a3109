"""`python -m dlm_ray.evaluation.studies.block_size`: one base at the whole row, fine-tuned to ever smaller blocks (BD3-LM's tables 1 to 3, small).

Text, network and optimizer are those of the study `objectives`. An AR model is adapted to masked diffusion over the whole row: the base. From it every
arm is fine-tuned for the same steps; what is trained from scratch takes as many steps as base and fine-tuning together. The bound of every
arm is over all of t with counted masks, which at blocks of one is the exact likelihood.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import objectives, runner
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Study
from dlm_ray.evaluation.studies.variance import over_draws
from dlm_ray.evaluation.sweeps import clip_search

from dlm_ray.config.load import validate
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.reading import read_split
from dlm_ray.generation.loading import load
from dlm_ray.training import loop

BASE_STEPS, STEPS = 300, 150
SEARCHED = (4, 8, 16, 32, 64, 128)


def _block(size: int, **keys: Any) -> dict[str, Any]:
    return {"name": "block", "block_tokens": size, **keys}


_HEAVY, _MIDDLE = (
    {"beta": beta, "omega": omega, "weight": "paper", "enforce": "counts"} for beta, omega in ((0.45, 0.95), (0.3, 0.8))
)
_RANDOM_BATCH = {"weight": "flat", "normalize_by": "global_masked"}
ARMS = (
    Arm("row (128)", {"objective": _block(128)}, "31.78"),
    Arm("16", {"objective": _block(16)}, "31.33"),
    Arm("16, clip 0.3-0.8", {"objective": _block(16, clip=_MIDDLE)}, "31.19"),
    Arm("8", {"objective": _block(8)}, ""),
    Arm("4", {"objective": _block(4)}, "29.23"),
    Arm("4, clip 0.45-0.95", {"objective": _block(4, clip=_HEAVY)}, "29.21 (of 30.18, 3B tokens)"),
    Arm("4, x_t only", {"objective": _block(4, context="noisy")}, "73.2 (of 29.2, 50K steps)"),
    Arm("1, linear", {"objective": _block(1)}, "<= 25.56"),
    Arm("1, all masked", {"objective": _block(1, mask_sampler="count")}, "22.88"),
    Arm("1, random batch size", {"objective": _block(1, **_RANDOM_BATCH)}, "24.37"),
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


def study(seeds: int, steps: int) -> Study:
    """The arms; an arm's settings are a whole recipe but for seed, data and base."""
    return Study(
        name="block_size",
        question="One base at the whole row, fine-tuned to smaller blocks: what does the size of a block cost, and what do clips and contexts do?",
        metric="bits_per_character",
        unit="bits per character",
        arms=tuple(replace(arm, settings=_settings(arm, steps)) for arm in ARMS),
        seeds=tuple(range(seeds)),
        baseline="row (128)",
        orderings=ORDERINGS,
        ratios=("train_seconds", "nelbo_variance", "gradient_variance"),
    )


def _settings(arm: Arm, steps: int) -> dict[str, Any]:
    is_scratch = arm.settings.get("from") == "scratch"
    own = objectives.tree(
        dict(arm.settings["objective"]), objectives.BASE_STEPS + BASE_STEPS + steps if is_scratch else steps
    )
    return {**own, "from": "scratch" if is_scratch else "the base"}


def recipe_of(arm: Arm, seed: int, data: str, base: str) -> Recipe:
    """The run of an arm: an ordinary recipe."""
    settings = {name: value for name, value in arm.settings.items() if name != "from"}
    architecture = objectives.base_recipe(data).model.model_dump()
    model = architecture if arm.settings["from"] == "scratch" else {"base": base}
    return validate({**settings, "seed": seed, "model": model, "data": {"sources": [{"path": data}]}}, arm.name)


def whole_row_base(data: str, ar_base: str, folder: Path) -> str:
    """Masked diffusion over the whole row, from the AR model: where every fine-tuned arm starts."""
    own = {
        **objectives.tree({"name": "masked"}, BASE_STEPS),
        "seed": 1000,
        "model": {"base": ar_base},
        "data": {"sources": [{"path": data}]},
    }
    loop.fit(validate(own, "the base"), folder)
    return str(folder)


def one(arm: Arm, seed: int, folder: Path, data: str, base: str) -> Outcome:
    """Trains, scores held-out text, and measures the variances of the objective as it was trained."""
    recipe = recipe_of(arm, seed, data, base)
    started = time.monotonic()
    result = loop.fit(recipe, folder)
    seconds = time.monotonic() - started
    model = load(folder)
    scored = model.score(data, max_sequences=objectives.HELD_OUT_ROWS, draws_per_sequence=objectives.DRAWS)
    rows = read_split(data, "train", objectives.ROWS)
    varying = over_draws(
        model.denoiser,
        objectives.trained_objective(recipe, model),
        rows,
        document_mask=recipe.data.document_mask,
        num_losses=objectives.NUM_LOSSES,
        num_gradients=objectives.NUM_GRADIENTS,
        seed=1,
    )
    metrics = {"bits_per_character": scored.bits_per_byte, "train_seconds": seconds, **varying}
    details = {"steps": result["step"]}
    return Outcome(metrics, (scored.nats / math.log(2)).tolist(), scored.num_bytes.tolist(), details)


def search(base: str, data: str, out: Path, rows: int = 64, draws: int = 4) -> list[str]:
    """The clip search on the base for every size of SEARCHED, unless it is there: a heat map each in `out`, and a line each for the report."""
    model = load(base)
    lines, centres = [], []
    for size in SEARCHED:
        folder = out / f"clips_{size}"
        if not (folder / "clip_search.json").exists():
            found = clip_search.search(model, data, size, rows=rows, draws=draws)
            about = {
                "checkpoint": "the base of the study block_size",
                "block_tokens": size,
                "rows": rows,
                "draws": draws,
            }
            clip_search.write(found, folder, about)
        best, *others = json.loads((folder / "clip_search.json").read_text())["candidates"]
        full = next(one for one in (best, *others) if one["omega"] - one["beta"] > 0.95)
        centres.append((best["beta"] + best["omega"]) / 2)
        lines.append(
            f"Clip search on the base, blocks of {size}: [{best['beta']:g}, {best['omega']:g}], variance {best['variance']:.3g} (full range "
            f"{full['variance']:.3g}); {best['masked_tokens']:.2f} masked tokens a block (full range {full['masked_tokens']:.2f})."
        )
    return [*lines, verdict(centres)]


def verdict(centres: Sequence[float]) -> str:
    """Whether smaller blocks chose heavier masking, from the middles of the chosen clips, the smallest block first."""
    order = ", ".join(f"{size}: {centre:.3g}" for size, centre in zip(SEARCHED, centres, strict=True))
    rises = centres[0] > centres[-1]
    if not rises:
        outcome = "did not hold: the smallest blocks chose no heavier masking than the row"
    elif all(small >= large for small, large in zip(centres, centres[1:], strict=False)):
        outcome = "held"
    else:
        outcome = "held between the ends, not at every step"
    return f"The middle of the chosen clip by block size: {order}. The paper's finding that smaller blocks want heavier masking {outcome}."


def notes(records: Sequence[runner.Record], corpus: dict[str, Any], steps: int) -> list[str]:
    """What a reader has to know."""
    total = objectives.BASE_STEPS + BASE_STEPS + steps
    return [
        f"Text, network and optimizer are those of the study `objectives`: {corpus['documents']} documents, {corpus['characters']:,} characters (sha256 of "
        f"the source {corpus['sha256'][:12]}); rows of {objectives.ROW_TOKENS} characters, {objectives.ROWS} a step.",
        f"The base: an AR model ({objectives.BASE_STEPS} steps), adapted with shift to masked diffusion over the whole row ({BASE_STEPS} steps). Every "
        f"arm takes {steps} steps from there; what is from scratch takes {total}. The papers' base and arms have no shift and no AR model before them.",
        "With shift, blocks of one with everything masked are the AR model: that arm turns the base back into one.",
        "Published: test perplexities on One Billion Words (BD3-LM's tables 1, 2, 3 and 8 and its review), each from another budget; only their order "
        "is compared with ours. Bits here are per character.",
        "`1, random batch size` is the AR loss of a random half of the tokens of every batch. The arms with a clip are scored over the full range.",
        "Variances are of each arm's own training loss over draws of t and masks on one batch at the end of training; clipped losses, and `4, x_t only`, are "
        "estimates of something else than the bound.",
        "Times of runs are rough, because the machine had other work; `python -m dlm_ray.evaluation.speed train` measures steps interleaved.",
    ]


def main() -> None:
    """The command line."""
    arguments = objectives.command_line("dlm_ray.evaluation.studies.block_size", __doc__ or "", STEPS)
    chosen = study(arguments.seeds, arguments.steps)
    corpus, data, ar_base = objectives.prepare(arguments.out)
    results = arguments.results or arguments.out
    base = whole_row_base(data, ar_base, arguments.out / "whole_row_base")
    searched = search(base, data, results)
    records = runner.run(
        chosen,
        lambda arm, seed, folder: one(arm, seed, folder, data, base),
        arguments.out,
        arguments.minutes,
        objectives.print_progress,
    )
    objectives.finish(chosen, records, results, [*notes(records, corpus, arguments.steps), *searched])


if __name__ == "__main__":
    main()
