"""Study `draws`: which way to draw t and masks gives the estimate of the bound, and its gradient, the least variance?

The MD4 models of the study `objectives`, one per seed, are measured and not trained. All arms estimate the same bound.

Arms: t independent, stratified, antithetic, or in BD3-LM's order; counted masks; complementary pairs; five other
noise schedules; tauLDR's estimators with one token or all masked tokens.
Claims: MD4's review (stratified and antithetic t help) and its appendix (tauLDR's single token does not).
Command: python -m dlm_ray.evaluation.studies.draws --runs DIR, where DIR is the --out of the study `objectives`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import setup
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Record, Study
from dlm_ray.evaluation.studies.variance import draw_variances

from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import folder_argument
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion import schedules
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.objectives import Masked, TauLDR
from dlm_ray.generation.loading import load

BATCH_SIZE, NUM_LOSSES, NUM_GRADIENTS = 16, 40, 10

STUDY = Study(
    name="draws",
    question="For one trained model and one batch of sequences: how much does the estimate of the bound, and its "
    "gradient, vary with the draws?",
    metric="nelbo_variance",
    unit="variance of the batch's bound, (nats per token)^2",
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


def build_objective(settings: Mapping[str, Any]) -> Masked:
    """Return masked diffusion with the draws of an arm."""
    if "estimator" in settings:
        return TauLDR(Absorbing(), estimator=settings["estimator"])
    if "schedule" in settings:
        return Masked(Absorbing(schedules.build(settings["schedule"])))
    return Masked(Absorbing(**settings))


def run_arm(arm: Arm, seed: int, runs: Path) -> Outcome:
    """Measure the variances of an arm on the model of a seed.

    Complementary pairs are drawn for half of the sequences, so that every arm has the same number of network passes.

    Args:
        arm: the way to draw.
        seed: the training seed of the model.
        runs: the folder of the study `objectives`.

    Raises:
        UserError: if that study has no model for the seed.
    """
    run_dir = runs / "runs" / f"md4-{seed}"
    if not run_dir.exists():
        raise UserError(
            f"{run_dir} does not exist; run `python -m dlm_ray.evaluation.studies.objectives --out {runs}` first"
        )
    model = load(run_dir)
    sequences = read_split(str(runs / "text8" / "data"), "train", BATCH_SIZE)
    objective = build_objective(arm.settings)
    if arm.settings.get("complementary"):
        objective.draws_per_sequence, sequences = 2, sequences[: BATCH_SIZE // 2]
    return Outcome(
        draw_variances(model, objective, sequences, num_losses=NUM_LOSSES, num_gradients=NUM_GRADIENTS, seed=2)
    )


def notes(records: Sequence[Record]) -> list[str]:
    """Return the report's notes."""
    return [
        f"Models: MD4 of the study `objectives`, one per training seed; {BATCH_SIZE} sequences, {NUM_LOSSES} draws "
        f"for the bound and {NUM_GRADIENTS} for the gradient. Pairs are drawn for half as many sequences: equally "
        "many passes, fewer texts.",
        "The baseline is the usual implementation: an independent t for each sequence. `paper` has strata in the "
        "order of the batch.",
    ]


def main() -> None:
    """Run the study from the command line."""
    parser = setup.argument_parser("draws", __doc__)
    parser.add_argument(
        "--runs", type=folder_argument, required=True, help="the --out folder of the study `objectives`"
    )
    arguments = setup.parse_arguments(parser)
    setup.run_and_report(
        STUDY,
        lambda arm, seed, folder: run_arm(arm, seed, arguments.runs),
        arguments.runs / "draws",
        arguments,
        notes,
    )


if __name__ == "__main__":
    main()
