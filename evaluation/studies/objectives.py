"""`python -m dlm_ray.evaluation.studies.objectives`: every objective on the same text, network, budget and seeds (MD4's text8 table, small).

Real text in the 27-letter form of text8, a Llama of 0.8 M parameters that was trained as an AR model before, a minute a run. The bound of
every arm is over the full range of t with common draws; what has no bound (SSD-LM) is listed and not compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dlm_ray.evaluation.studies import runner, text8
from dlm_ray.evaluation.studies.report import write_report
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Study
from dlm_ray.evaluation.studies.variance import over_draws

from dlm_ray.config.load import validate
from dlm_ray.config.paths import folder_argument
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.index import load_index
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion import likelihood, schedules
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.draws import Draw, maskable_positions
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.diffusion.schedules import Shifted
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.generation.loading import load
from dlm_ray.generation.text_model import TextModel
from dlm_ray.training import loop, setup

ROW_TOKENS, ROWS, LEARNING_RATE = 128, 16, 2e-3
BASE_STEPS = 800
HELD_OUT_ROWS, DRAWS = 256, 4
NUM_LOSSES, NUM_GRADIENTS = 40, 12
TIMESTEPS = (100, 1000, 10_000)

ARMS = (
    Arm("AR", {"name": "autoregressive"}, "1.23"),
    Arm("MD4", {"name": "masked"}, "<= 1.37"),
    Arm("MD4, cosine", {"name": "masked", "schedule": {"name": "cosine"}}, ""),
    Arm("MD4, count", {"name": "masked", "mask_sampler": "count"}, ""),
    Arm("MD4, two draws a row", {"name": "masked", "draws_per_sequence": 2}, ""),
    Arm("GenMD4", {"name": "genmd4"}, "<= 1.34"),
    Arm("GenMD4, scalar w", {"name": "genmd4", "exponents": "scalar"}, "1.37"),
    Arm("SEDD", {"name": "sedd"}, "<= 1.39"),
    Arm("D3PM, literal", {"name": "d3pm", "num_timesteps": 1000}, "<= 1.45"),
    Arm("tauLDR, one token", {"name": "tauldr"}, ""),
    Arm("SSD-LM", {"name": "ssd_lm", "simplex": {"block_tokens": 16, "num_timesteps": 1000}}, ""),
)
ORDERINGS = (
    ("AR", "MD4", "MD4, text8 table"),
    ("GenMD4", "MD4", "MD4, text8 table"),
    ("GenMD4", "MD4, two draws a row", "MD4, text8 table, at equal compute"),
    ("GenMD4", "GenMD4, scalar w", "MD4, review"),
    ("MD4", "SEDD", "MD4, text8 table"),
    ("MD4", "D3PM, literal", "MD4, text8 table"),
    ("MD4", "tauLDR, one token", "MD4, on CIFAR-10: 2.78 against 3.52"),
)


def study(seeds: int, steps: int) -> Study:
    """The arms; the settings of each are a whole recipe but for the seed and the places of data and base."""
    return Study(
        name="objectives",
        question="On the same text, network, budget and seeds: which objective gives the tightest bound, with which variance, at which speed?",
        metric="bits_per_character",
        unit="bits per character",
        arms=tuple(replace(arm, settings=tree(dict(arm.settings), steps)) for arm in ARMS),
        seeds=tuple(range(seeds)),
        baseline="MD4",
        orderings=ORDERINGS,
        ratios=("steps_per_second", "train_seconds", "nelbo_variance", "gradient_variance"),
    )


def tree(objective: dict[str, Any], steps: int) -> dict[str, Any]:
    """A recipe without its network, its data and its seed: what the studies in this setting share."""
    return {
        "name": "study",
        "objective": objective,
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "betas": [0.9, 0.98],
            "weight_decay": 0.03,
            "warmup_steps": min(30, steps // 4),
            "lr_schedule": "cosine",
        },
        "ema": {"decay": 0.98},
        "training": {"steps": steps, "global_batch_size": ROWS, "micro_batch_size": ROWS},
        "validation": {"sequences": 0},
        "checkpoint": {"every_steps": steps, "keep_last": 1},
        "tracking": {"log_every_steps": 20},
    }


def base_recipe(data: str) -> Recipe:
    """The AR model that every arm starts from."""
    architecture = {"family": "llama", "width": 128, "num_layers": 4, "num_heads": 4, "max_positions": ROW_TOKENS}
    whole = {
        **tree({"name": "autoregressive"}, BASE_STEPS),
        "model": {"architecture": architecture},
        "data": {"sources": [{"path": data}]},
    }
    return validate(whole, "the base")


def recipe_of(arm: Arm, seed: int, data: str, base: str) -> Recipe:
    """The run of an arm: an ordinary recipe."""
    return validate(
        {**arm.settings, "seed": seed, "model": {"base": base}, "data": {"sources": [{"path": data}]}}, arm.name
    )


def one(arm: Arm, seed: int, folder: Path, data: str, base: str) -> Outcome:
    """Trains, scores held-out text, and measures the variances of the objective at the end of training."""
    recipe = recipe_of(arm, seed, data, base)
    started = time.monotonic()
    result = loop.fit(recipe, folder)
    seconds = time.monotonic() - started
    model = load(folder)
    objective = trained_objective(recipe, model)
    rows = read_split(data, "train", ROWS)
    options = {
        "document_mask": recipe.data.document_mask,
        "num_losses": NUM_LOSSES,
        "num_gradients": NUM_GRADIENTS,
        "seed": 1,
    }
    metrics: dict[str, float | None] = {
        "steps_per_second": result["tokens_per_second"] / recipe.training.global_batch_size / ROW_TOKENS,
        "train_seconds": seconds,
        **over_draws(model.denoiser, objective, rows, **options),
    }
    if "consistency_gap" in result:
        metrics["consistency_gap_nats"] = result["consistency_gap"]
    if objective.likelihood == "none":
        metrics["block_bits_per_character"] = _block_bits(model, data)
        return Outcome(metrics)
    scored = model.score(data, max_sequences=HELD_OUT_ROWS, draws_per_sequence=DRAWS)
    metrics["bits_per_character"] = scored.bits_per_byte
    details: dict[str, Any] = {
        "ci95_draws": likelihood.draws_interval(scored.draw_totals, float(scored.num_bytes.sum()))
    }
    if arm.name == "MD4" and seed == 0:
        details["by_timesteps"] = by_timesteps(model, data)
    if arm.name.startswith("GenMD4"):
        details["exponents"] = [round(float(value), 4) for value in objective.exponents]
    return Outcome(metrics, (scored.nats / math.log(2)).tolist(), scored.num_bytes.tolist(), details)


class OwnTimes(Masked):
    """Masked diffusion that is evaluated by its own schedule and timesteps: the integral, to which reconstruction and prior belong."""

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """As the process is."""
        assert isinstance(self.process, Absorbing), "another process says itself how it is evaluated"
        return self.process.draw_at(seed, keys, t, maskable)


def by_timesteps(model: TextModel, data: str) -> dict[str, dict[str, float]]:
    """One model's bound in T steps and in continuous time, MD4's ends shifted by 1e-4: integral, reconstruction and prior, in bits a character."""
    rows = read_split(data, "held_out", HELD_OUT_ROWS)
    x_0 = np.stack([row.input_ids for row in rows]).astype(np.int64)
    document_ids = np.stack([row.document_ids for row in rows])
    num_bytes, num_tokens = sum(float(row.num_bytes.sum()) for row in rows), int(maskable_positions(document_ids).sum())
    found = {}
    cases = [(str(T), Absorbing(Shifted(schedules.Polynomial(), 1e-4, 1e-4), num_timesteps=T)) for T in TIMESTEPS]
    cases += [
        ("continuous, shifted", Absorbing(Shifted(schedules.Polynomial(), 1e-4, 1e-4))),
        ("continuous", Absorbing()),
    ]
    for name, process in cases:
        visible = lambda ids: Visibility(
            "bidirectional", document_ids=documents_apart(ids, model.document_mask, model.device)
        )  # noqa: E731
        own: Any = OwnTimes(process)
        nats = likelihood.token_nats(
            model.denoiser, own, x_0, document_ids, visible, model.device, num_draws=DRAWS
        ).nats.sum()
        vocab = model.denoiser.vocab_size
        # In discrete time the first interval, from s = 0, is part of the sum; the shifted alpha(0) leaves the rest to the reconstruction.
        ends = [schedules.reconstruction_nats(process.schedule, vocab), schedules.prior_nats(process.schedule, vocab)]
        parts = [
            likelihood.bits_per_byte(float(value), num_bytes) for value in (nats, *(end * num_tokens for end in ends))
        ]
        found[name] = {"integral": parts[0], "reconstruction": parts[1], "prior": parts[2], "total": sum(parts)}
    return found


def trained_objective(recipe: Recipe, model: TextModel) -> Any:
    """The objective that was trained, with its learned parameters, on the evaluated network."""
    index = load_index(recipe.data.sources[0].path)
    network = setup.resolve(recipe, setup.is_causal(recipe), index.tokenizer)
    objective = setup.build_objective(recipe, network, ROW_TOKENS)
    objective.load_state_dict(model.objective.state_dict())
    return objective.requires_grad_(False)


def _block_bits(model: TextModel, data: str) -> float:
    """SSD-LM's cross-entropy of a block's character, mean over t: a different question, in the same unit."""
    rows = read_split(data, "held_out", HELD_OUT_ROWS)
    x_0 = np.stack([row.input_ids for row in rows]).astype(np.int64)
    document_ids = np.stack([row.document_ids for row in rows])
    times = np.random.default_rng(0).permuted((np.arange(len(rows)) + 0.5) / len(rows))[:, None]
    total, count = 0.0, 0
    for first in range(0, len(rows), 64):
        pairs = [(row, 0) for row in range(first, min(first + 64, len(rows)))]
        batch = likelihood.evaluation_batch(
            model.objective,
            x_0,
            document_ids,
            pairs,
            times,
            0,
            lambda ids: Visibility(
                "bidirectional", document_ids=documents_apart(ids, model.document_mask, model.device)
            ),
            model.device,
        )
        with torch.no_grad():
            total += float((batch.draw.weight * model.objective.token_nll(model.denoiser, batch)).sum())
        count += batch.draw.num_scored
    return total / count / math.log(2)


def notes(records: Sequence[runner.Record], corpus: dict[str, Any], steps: int) -> list[str]:
    """What a reader has to know, and the evaluation in T steps."""
    found = [
        f"Text: the standard library of the Python that ran this, in text8's form: {corpus['documents']} documents, {corpus['characters']:,} "
        f"characters (sha256 of the source {corpus['sha256'][:12]}); a tenth of the documents held out; {HELD_OUT_ROWS} rows scored with {DRAWS} draws each.",
        f"Every run starts from one AR model ({BASE_STEPS} steps) and takes {steps} steps of {ROWS} rows of {ROW_TOKENS} characters with shift: "
        f"Llama of width 128 with 4 layers, no time input, AdamW {LEARNING_RATE:g}. GenMD4 sees each row twice a step, as MD4 with two draws does. "
        "From scratch, this budget leaves a masked model at the frequencies of letters (4.0 bits after 400 steps). The published column is text8 test "
        "from scratch, 1 M steps of 512 rows, 12 layers of 768: not the same question.",
        "The bound of D3PM and tauLDR models is MD4's form of the same integral; SEDD's is its own, with the consistency gap; GenMD4's its own, with "
        "the reconstruction term.",
        f"Variances are over draws of t and masks of one batch of {ROWS} training rows at the end of training, each objective by its own loss; SSD-LM's "
        "loss is of another quantity.",
    ]
    found.append(
        "Times of runs are rough, because the machine had other work during some; `python -m dlm_ray.evaluation.speed objectives` measures steps interleaved."
    )
    for record in records:
        for name, parts in record.details.get("by_timesteps", {}).items():
            found.append(
                f"MD4, seed {record.seed}, evaluated at T = {name}: {parts['total']:.4f} = integral {parts['integral']:.4f} + reconstruction "
                f"{parts['reconstruction']:.5f} + prior {abs(parts['prior']):.5f} bits per character"
            )
    return found


def command_line(module: str, about: str, steps: int, *, needs_quickstart: bool = False) -> argparse.Namespace:
    """What a study in this setting is asked; sets the threads of torch."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about.splitlines()[0])
    parser.add_argument(
        "--out",
        type=folder_argument,
        required=True,
        help="folder of the runs; the same command goes on where it stopped",
    )
    if needs_quickstart:
        parser.add_argument(
            "--quickstart",
            type=folder_argument,
            required=True,
            help="folder that `dlm-ray quickstart --out` has filled: data and base",
        )
    parser.add_argument(
        "--results",
        type=folder_argument,
        help="folder that gets the table, the figure and the numbers; --out if absent",
    )
    parser.add_argument("--minutes", type=float, help="start no run that would end later")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def prepare(out: Path) -> tuple[dict[str, Any], str, str]:
    """The corpus's fingerprint, the data folder, and the AR base, made in `out` unless they are there."""
    corpus = text8.build_data(out / "text8", ROW_TOKENS)
    data, base = str(out / "text8" / "data"), str(out / "base")
    loop.fit(base_recipe(data), base)
    return corpus, data, base


def hardware() -> str:
    """What the runs run on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def finish(chosen: Study, records: Sequence[runner.Record], out: Path, found: Sequence[str]) -> None:
    """Writes the report, and says what became of the published orderings."""
    written = write_report(chosen, records, out, hardware(), found)
    for verdict in runner.orderings(chosen, records):
        print(f"{verdict.better} below {verdict.worse} ({verdict.source}): {verdict.verdict}", file=sys.stderr)
    sys.stdout.write(json.dumps([str(path) for path in written]) + "\n")


def print_progress(message: str) -> None:
    """Progress."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """The command line."""
    arguments = command_line("dlm_ray.evaluation.studies.objectives", __doc__ or "", 250)
    chosen = study(arguments.seeds, arguments.steps)
    corpus, data, base = prepare(arguments.out)
    records = runner.run(
        chosen,
        lambda arm, seed, folder: one(arm, seed, folder, data, base),
        arguments.out,
        arguments.minutes,
        print_progress,
    )
    finish(chosen, records, arguments.results or arguments.out, notes(records, corpus, arguments.steps))


if __name__ == "__main__":
    main()
