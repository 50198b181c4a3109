"""`python -m dlm_ray.evaluation.studies.draws --runs DIR`: one trained masked model, many ways to draw t and masks: which varies least.

DIR is the folder of the study `objectives`; its MD4 models, one a seed, are measured, not trained. All arms estimate the same bound.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from dlm_ray.evaluation.studies import runner
from dlm_ray.evaluation.studies.report import write_report
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Study
from dlm_ray.evaluation.studies.variance import over_draws

from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import folder_argument
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion import schedules
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.objectives import Masked, TauLDR
from dlm_ray.generation.loading import load

ROWS, NUM_LOSSES, NUM_GRADIENTS = 16, 40, 10

STUDY = Study(
    name="draws",
    question="Of one trained model and one batch of rows: by how much does the estimate of the bound, and its gradient, vary with the draws?",
    metric="nelbo_variance",
    unit="variance of the batch's bound, (nats a token)^2",
    arms=(
        Arm("independent", {"times": "independent"}),
        Arm("stratified", {"times": "stratified"}),
        Arm("antithetic", {"times": "antithetic"}),
        Arm("paper (BD3-LM's order)", {"times": "paper"}),
        Arm("count", {"mask_sampler": "count"}),
        Arm("complementary pairs", {"complementary": True}),
        Arm("cosine", {"schedule": "cosine"}),
        Arm("square", {"schedule": "square"}),
        Arm("square root", {"schedule": "square_root"}),
        Arm("log", {"schedule": "log"}),
        Arm("geometric", {"schedule": "geometric"}),
        Arm("tauLDR, one token", {"estimator": "one_token"}),
        Arm("tauLDR, all masked", {"estimator": "all_masked"}),
    ),
    seeds=(0, 1, 2),
    baseline="independent",
    orderings=(
        ("stratified", "independent", "MD4, review"),
        ("antithetic", "independent", "MD4, review"),
        ("count", "stratified", "derivation for independent tokens"),
        ("stratified", "tauLDR, one token", "MD4, appendix"),
        ("stratified", "cosine", "none"),
    ),
    ratios=("gradient_variance",),
)


def objective_of(settings: Mapping[str, Any]) -> Masked:
    """Masked diffusion with these draws."""
    chosen = dict(settings)
    if "estimator" in chosen:
        return TauLDR(Absorbing(), estimator=chosen["estimator"])
    if "schedule" in chosen:
        return Masked(Absorbing(schedules.build(chosen["schedule"])))
    return Masked(Absorbing(**chosen))


def one(arm: Arm, seed: int, runs: Path) -> Outcome:
    """The variances of an arm on the model of a seed; pairs are drawn on half as many rows, so that every arm has as many passes."""
    run_dir = runs / "runs" / f"md4-{seed}"
    if not run_dir.exists():
        raise UserError(
            f"{run_dir} is not there; run `python -m dlm_ray.evaluation.studies.objectives --out {runs}` first"
        )
    model = load(run_dir)
    rows = read_split(str(runs / "text8" / "data"), "train", ROWS)
    objective = objective_of(arm.settings)
    if arm.settings.get("complementary"):
        objective.draws_per_sequence, rows = 2, rows[: ROWS // 2]
    options = {
        "document_mask": model.document_mask,
        "num_losses": NUM_LOSSES,
        "num_gradients": NUM_GRADIENTS,
        "seed": 2,
    }
    return Outcome(over_draws(model.denoiser, objective, rows, **options))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dlm_ray.evaluation.studies.draws", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--runs", type=folder_argument, required=True, help="folder of the study `objectives`")
    parser.add_argument(
        "--results",
        type=folder_argument,
        help="folder that gets the table, the figure and the numbers; --runs/draws if absent",
    )
    parser.add_argument("--minutes", type=float, help="start no run that would end later")
    arguments = parser.parse_args()
    out = arguments.runs / "draws"
    say = lambda message: print(message, file=sys.stderr, flush=True)  # noqa: E731
    records = runner.run(STUDY, lambda arm, seed, folder: one(arm, seed, arguments.runs), out, arguments.minutes, say)
    hardware = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    )
    notes = [
        f"Models: MD4 of the study `objectives`, one a training seed; {ROWS} rows, {NUM_LOSSES} draws for the bound and {NUM_GRADIENTS} for the "
        "gradient. Pairs are drawn on half as many rows: as many passes, fewer texts.",
        "The baseline is what most code does: one independent t a row. `paper` has strata in the order of the batch.",
    ]
    for path in write_report(STUDY, records, arguments.results or out, hardware, notes):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
