"""The result of a sweep: the measurement at common draws, the ranking with its ties, and the files."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dlm_ray.evaluation.sweeps import report
from dlm_ray.evaluation.sweeps.measure import block_variances, measure
from dlm_ray.evaluation.sweeps.ranking import TrialResult, best, ranked
from helpers.recipes import tiny_recipe

from dlm_ray.cli import console
from dlm_ray.config.sweep import Measure, Sweep
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.objectives import D3pm, Masked
from dlm_ray.generation.loading import load
from dlm_ray.report import figures
from dlm_ray.training import loop

pytestmark = pytest.mark.long

SETTINGS = Measure(
    sequences=12, draws_per_sequence=2, variance_draws=3, variance_sequences=12, gradient_draws=2, gradient_sequences=4
)
CLIP = {"beta": 0.45, "omega": 0.95}


def run(folder, data, **changes):
    loop.fit(tiny_recipe(data, training__steps=4, **changes), folder)
    return str(folder)


@pytest.fixture(scope="module")
def measured(data_folder, tmp_path_factory):
    """Return the measurements of block models that differ in their clip, of a whole-sequence and an AR model."""
    out = tmp_path_factory.mktemp("measured")
    blocks = {"objective__name": "block", "objective__block_tokens": 4}
    runs = {
        "linear": run(out / "linear", data_folder, **blocks),
        "paper": run(out / "paper", data_folder, **blocks, objective__clip={**CLIP, "weight": "paper"}),
        "unbiased": run(out / "unbiased", data_folder, **blocks, objective__clip={**CLIP, "weight": "unbiased"}),
        "whole": run(out / "whole", data_folder),
        "ar": run(out / "ar", data_folder, objective__name="autoregressive"),
    }
    return {name: measure(folder, SETTINGS, data_folder) for name, folder in runs.items()} | {"folders": runs}


def test_the_bound_is_over_all_of_t_whatever_was_trained(measured, data_folder):
    scored = load(measured["folders"]["paper"]).score(data_folder, max_sequences=12, draws_per_sequence=2)
    assert (
        measured["paper"]["bits_per_byte"] == scored.bits_per_byte and measured["paper"]["nats"] == scored.nats.tolist()
    )
    low, high = measured["paper"]["ci95_documents"]
    assert low < measured["paper"]["bits_per_byte"] < high and measured["paper"]["is_bound"]
    assert len(measured["paper"]["nll_by_t"]) == 5 and measured["paper"]["tokens_per_second"] > 0


def test_a_clip_lowers_the_variance_of_a_blocks_bound_and_its_constant_does_not(measured):
    """With its constant factor 0.5, `unbiased` would have about a quarter of the variance of `paper`."""
    assert measured["paper"]["nelbo_variance"] < measured["linear"]["nelbo_variance"] / 2
    assert measured["unbiased"]["nelbo_variance"] == pytest.approx(measured["paper"]["nelbo_variance"], rel=0.1)
    assert measured["whole"]["nelbo_variance"] > 0 and measured["whole"]["gradient_variance"] > 0


def test_a_causal_model_has_no_variance_over_draws(measured):
    assert measured["ar"]["nelbo_variance"] is None and not measured["ar"]["is_bound"]


PAIRED = {
    "complementary": {"objective__complementary": True, "objective__draws_per_sequence": 2},
    "genmd4": {"objective__name": "genmd4"},
    "block, complementary": {
        "objective": {"name": "block", "block_tokens": 8, "complementary": True, "draws_per_sequence": 4},
        "training__global_batch_size": 4,
    },
}


@pytest.mark.parametrize("num_sequences", [2, 5, 9])
@pytest.mark.parametrize("changes", PAIRED.values(), ids=PAIRED)
def test_paired_draws_are_measured_on_any_number_of_sequences(changes, num_sequences, data_folder, tmp_path):
    folder = run(tmp_path, data_folder, validation__sequences=3, **changes)
    settings = Measure(
        sequences=num_sequences,
        draws_per_sequence=2,
        variance_draws=2,
        variance_sequences=num_sequences,
        gradient_draws=2,
        gradient_sequences=3,
    )
    result = measure(folder, settings, data_folder)
    assert len(result["variances"]) == 2 and result["nelbo_variance"] > 0 and result["gradient_variance"] > 0


def test_paired_draws_are_of_one_sequence(data_folder, tmp_path, monkeypatch):
    """The second draw of a pair masks the positions that the first leaves clean, as in training."""
    model = load(run(tmp_path, data_folder))
    objective = Masked(Absorbing(complementary=True), draws_per_sequence=2)
    batches = []
    monkeypatch.setattr(objective, "training_nats", lambda denoiser, batch: batches.append(batch) or batch.draw.weight)
    block_variances(model, objective, read_split(data_folder, "held_out", 3), 1)
    x_0, is_masked, maskable = (
        torch.cat([of(batch) for batch in batches])
        for of in (lambda b: b.x_0, lambda b: b.draw.is_masked, lambda b: b.draw.maskable)
    )
    assert torch.equal(x_0[::2], x_0[1::2]) and torch.equal(is_masked[::2] ^ is_masked[1::2], maskable[::2])


def test_the_variance_of_d3pms_bound_is_near_that_of_its_closed_form(data_folder, tmp_path):
    """The measured terms are D3PM's KLs, which are near MD4's, and not T times the cross-entropy of every token."""
    sequences = read_split(data_folder, "held_out", 12)
    model = load(run(tmp_path, data_folder, objective__name="d3pm", objective__num_timesteps=50))
    closed = block_variances(model, Masked(Absorbing(num_timesteps=50)), sequences, 8)
    literal = block_variances(model, D3pm(Absorbing(num_timesteps=50)), sequences, 8)
    assert np.mean(literal) == pytest.approx(np.mean(closed), rel=0.5)


def test_a_single_block_has_no_variance_over_blocks(measured, data_folder):
    model = load(measured["folders"]["whole"])
    assert block_variances(model, model.objective, read_split(data_folder, "held_out", 1), 2) is None


def trial(number, settings, values, status="finished", **measurements):
    """Return a trial with `values` as the nats of its documents of 10 bytes each."""
    nats = np.array(values, dtype=float)
    fields = {
        "bits_per_byte": float(nats.sum()) / math.log(2) / max(1, 10 * len(nats)),
        "nats": nats.tolist(),
        "bytes": [10.0] * len(nats),
        **measurements,
    }
    return TrialResult(
        number,
        settings,
        status,
        "",
        8,
        f"runs/{number}",
        [],
        [(1.0, 3.0), (2.0, 2.0)],
        fields if status == "finished" else {},
    )


def test_a_trial_is_tied_if_its_paired_interval_covers_zero():
    generator = np.random.default_rng(0)
    documents = generator.normal(20, 8, 60)  # documents differ far more than models do
    trials = [
        trial(0, {"a": 0}, documents + generator.normal(0.5, 0.1, 60)),
        trial(1, {"a": 1}, documents),
        trial(2, {"a": 2}, documents + generator.normal(0.0, 1.0, 60) + 0.01),
        trial(3, {"a": 3}, [], "stopped"),
        trial(4, {"a": 4}, [], "failed"),
    ]
    ranking = ranked(trials, "bits_per_byte", None)
    first, second, third = (entry.trial.number for entry in ranking[:3])
    assert {first, second} == {1, 2} and third == 0 and [entry.place for entry in ranking] == [1, 2, 3, None, None]
    assert [entry.is_tied for entry in ranking] == [False, True, False, False, False]
    assert [entry.trial.status for entry in ranking[3:]] == ["stopped", "failed"] and best(ranking) == [
        ranking[0].trial
    ]
    assert ranking[2].low > 0 and ranking[2].difference == pytest.approx(0.5 / math.log(2) / 10, rel=0.4)


def test_with_one_document_it_is_unknown_whether_a_trial_is_tied(tmp_path, capsys):
    """A bootstrap over one document has no width and would exclude 0 for any difference."""
    ranking = ranked(
        [trial(0, {"a": 0}, [20.0], ci95_documents=None), trial(1, {"a": 1}, [20.1], ci95_documents=None)],
        "bits_per_byte",
        None,
    )
    assert [(entry.place, entry.low, entry.high, entry.is_tied) for entry in ranking] == [
        (1, None, None, False),
        (2, None, None, None),
    ]
    assert ranking[1].difference > 0
    sweep = Sweep(name="s", recipe="quickstart", space={"a": {"grid": [0, 1]}}, metric="bits_per_byte")
    report.write(sweep, ranking, [], tmp_path, 90.0)
    lines = json.loads((tmp_path / "results.json").read_text())
    assert [line["tied"] for line in lines] == [False, None]
    assert pq.read_table(tmp_path / "results.parquet").to_pylist()[1]["tied"] is None
    assert "no interval" in (tmp_path / "report.html").read_text()
    console.print_sweep({"trials": lines}, "bits_per_byte", tmp_path)
    assert "no interval" in " ".join(capsys.readouterr().out.split())


def test_trials_are_ranked_within_their_group_and_a_higher_speed_is_better():
    trials = [
        trial(
            number,
            {"k": number % 2},
            [1.0],
            tokens_per_second=float(number),
            nelbo_variance=9.0 - number,
            variances=[9.0 - number] * 3,
        )
        for number in range(4)
    ]
    assert [winner.number for winner in best(ranked(trials, "tokens_per_second", None))] == [3]
    assert [winner.number for winner in best(ranked(trials, "nelbo_variance", "k"))] == [2, 3]


def test_a_trial_whose_metric_is_not_finite_has_no_place(tmp_path):
    trials = [
        trial(0, {"seed": 0}, [math.nan]),
        trial(1, {"seed": 1}, [1.0]),
        trial(2, {"seed": 2}, [math.inf]),
        trial(3, {"seed": 3}, [0.9]),
    ]
    ranking = ranked(trials, "bits_per_byte", None)
    assert [(entry.trial.number, entry.place) for entry in ranking] == [(3, 1), (1, 2), (0, None), (2, None)]
    sweep = Sweep(name="s", recipe="quickstart", space={"seed": {"grid": [0, 1, 2, 3]}})
    report.write(sweep, ranking, [], tmp_path, 90.0)
    [only] = ranked(trials[1:2], "bits_per_byte", None)
    assert (only.place, only.difference, only.is_tied) == (1, 0.0, False)


def test_the_heat_map_shows_the_best_trial_of_each_clip(monkeypatch, tmp_path):
    """Trials of one clip may differ in other settings."""
    clips, drawn = [None, {"beta": 0.3, "omega": 0.8}], []
    settings = [{"objective.clip": clip, "seed": seed} for seed in (0, 1) for clip in clips]
    trials = [
        trial(number, values, [1.0], nelbo_variance=variance, variances=[variance] * 2)
        for number, (values, variance) in enumerate(zip(settings, (4, 1, 2, 3), strict=True))
    ]
    sweep = Sweep(
        name="s",
        recipe="quickstart",
        space={"objective.clip": {"grid": clips}, "seed": {"grid": [0, 1]}},
        metric="nelbo_variance",
    )
    original = figures.heat_map
    monkeypatch.setattr(
        figures, "heat_map", lambda cells, *labels: drawn.append(dict(cells)) or original(cells, *labels)
    )
    report.write(sweep, ranked(trials, "nelbo_variance", None), [], tmp_path, 90.0)
    assert drawn == [{(0.0, 1.0): 2, (0.3, 0.8): 1}]


def test_the_files_have_every_trial_and_the_report_its_figures(tmp_path):
    clips = [None, {"beta": 0.3, "omega": 0.8}, {"beta": 0.5, "omega": 1.0}]
    trials = [
        trial(i, {"objective.clip": clip}, [1.0 + i, 2.0], nelbo_variance=3.0 - i, variances=[3.0 - i, 3.1 - i])
        for i, clip in enumerate(clips)
    ]
    trials += [trial(3, {"objective.clip": None}, [], "failed")]
    sweep = Sweep(
        name="s",
        recipe="quickstart",
        space={"objective.clip": {"grid": clips}},
        metric="nelbo_variance",
        confirm={"overrides": ["seed=1"]},
    )
    ranking = ranked(trials, "nelbo_variance", None)
    report.write(sweep, ranking, [trials[2]], tmp_path, 90.0)
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(line["number"], line["status"], line["place"]) for line in table] == [
        (2, "finished", 1), (1, "finished", 2), (0, "finished", 3), (3, "failed", None), (2, "confirmed", None),
    ]  # fmt: skip
    assert json.loads(table[0]["objective.clip"]) == clips[2] and table[0]["nelbo_variance"] == 1.0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 3  # heat map, parallel coordinates, curves
    assert "confirmed by a longer run" in text and "[0.5, 1]" in text
