"""What a sweep makes of its trials: the measurement at common draws, the order with its ties, and the files."""

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

ASKED = Measure(
    sequences=12, draws_per_sequence=2, variance_draws=3, variance_sequences=12, gradient_draws=2, gradient_sequences=4
)
CLIP = {"beta": 0.45, "omega": 0.95}


def run(folder, data, **changes):
    loop.fit(tiny_recipe(data, training__steps=4, **changes), folder)
    return str(folder)


@pytest.fixture(scope="module")
def measured(data_folder, tmp_path_factory):
    """One network, trained alike but for what its noise is clipped to, and a whole-row one."""
    out = tmp_path_factory.mktemp("measured")
    blocks = {"objective__name": "block", "objective__block_tokens": 4}
    runs = {
        "linear": run(out / "linear", data_folder, **blocks),
        "paper": run(out / "paper", data_folder, **blocks, objective__clip={**CLIP, "weight": "paper"}),
        "unbiased": run(out / "unbiased", data_folder, **blocks, objective__clip={**CLIP, "weight": "unbiased"}),
        "row": run(out / "row", data_folder),
        "ar": run(out / "ar", data_folder, objective__name="autoregressive"),
    }
    return {name: measure(folder, ASKED, data_folder) for name, folder in runs.items()} | {"folders": runs}


def test_the_bound_is_over_all_of_t_whatever_was_trained(measured, data_folder):
    scored = load(measured["folders"]["paper"]).score(data_folder, max_sequences=12, draws_per_sequence=2)
    assert (
        measured["paper"]["bits_per_byte"] == scored.bits_per_byte and measured["paper"]["nats"] == scored.nats.tolist()
    )
    low, high = measured["paper"]["ci95_documents"]
    assert low < measured["paper"]["bits_per_byte"] < high and measured["paper"]["is_bound"]
    assert len(measured["paper"]["nll_by_t"]) == 5 and measured["paper"]["tokens_per_second"] > 0


def test_a_clip_lowers_the_variance_of_a_blocks_bound_and_its_constant_does_not(measured):
    """The two clipped runs hardly differ in their weights; with its constant 0.5, `unbiased` would have about a quarter of the variance."""
    assert measured["paper"]["nelbo_variance"] < measured["linear"]["nelbo_variance"] / 2
    assert measured["unbiased"]["nelbo_variance"] == pytest.approx(measured["paper"]["nelbo_variance"], rel=0.1)
    assert measured["row"]["nelbo_variance"] > 0 and measured["row"]["gradient_variance"] > 0


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


@pytest.mark.parametrize("rows", [2, 5, 9])
@pytest.mark.parametrize("changes", PAIRED.values(), ids=PAIRED)
def test_draws_that_come_in_pairs_are_measured_on_any_number_of_rows(changes, rows, data_folder, tmp_path):
    folder = run(tmp_path, data_folder, validation__sequences=3, **changes)
    asked = Measure(
        sequences=rows,
        draws_per_sequence=2,
        variance_draws=2,
        variance_sequences=rows,
        gradient_draws=2,
        gradient_sequences=3,
    )
    found = measure(folder, asked, data_folder)
    assert len(found["variances"]) == 2 and found["nelbo_variance"] > 0 and found["gradient_variance"] > 0


def test_pairs_are_two_draws_of_one_text(data_folder, tmp_path, monkeypatch):
    """What one of a pair masks, the other leaves clean: of the same row, as in training."""
    model = load(run(tmp_path, data_folder))
    objective = Masked(Absorbing(complementary=True), draws_per_sequence=2)
    seen = []
    monkeypatch.setattr(objective, "training_nats", lambda denoiser, batch: seen.append(batch) or batch.draw.weight)
    block_variances(model, objective, read_split(data_folder, "held_out", 3), 1)
    x_0, is_masked, maskable = (
        torch.cat([of(batch) for batch in seen])
        for of in (lambda b: b.x_0, lambda b: b.draw.is_masked, lambda b: b.draw.maskable)
    )
    assert torch.equal(x_0[::2], x_0[1::2]) and torch.equal(is_masked[::2] ^ is_masked[1::2], maskable[::2])


def test_the_variance_of_d3pms_bound_is_near_that_of_the_bound_which_it_approximates(data_folder, tmp_path):
    """Its terms are the KLs that it is trained with, which with a small epsilon are near MD4's, and not T times every token's cross-entropy."""
    rows = read_split(data_folder, "held_out", 12)
    model = load(run(tmp_path, data_folder, objective__name="d3pm", objective__num_timesteps=50))
    closed = block_variances(model, Masked(Absorbing(num_timesteps=50)), rows, 8)
    literal = block_variances(model, D3pm(Absorbing(num_timesteps=50)), rows, 8)
    assert np.mean(literal) == pytest.approx(np.mean(closed), rel=0.5)


def test_a_single_block_of_text_has_no_variance_over_blocks(measured, data_folder):
    model = load(measured["folders"]["row"])
    assert block_variances(model, model.objective, read_split(data_folder, "held_out", 1), 2) is None


def row(number, settings, values, status="finished", **measured_as):
    nats = np.array(values, dtype=float)
    fields = {
        "bits_per_byte": float(nats.sum()) / math.log(2) / max(1, 10 * len(nats)),
        "nats": nats.tolist(),
        "bytes": [10.0] * len(nats),
        **measured_as,
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


def test_ties_are_decided_by_the_paired_interval():
    generator = np.random.default_rng(0)
    documents = generator.normal(20, 8, 60)  # far more between documents than between models
    rows = [
        row(0, {"a": 0}, documents + generator.normal(0.5, 0.1, 60)),
        row(1, {"a": 1}, documents),
        row(2, {"a": 2}, documents + generator.normal(0.0, 1.0, 60) + 0.01),
        row(3, {"a": 3}, [], "stopped"),
        row(4, {"a": 4}, [], "failed"),
    ]
    found = ranked(rows, "bits_per_byte", None)
    first, second, third = (one.row.number for one in found[:3])
    assert {first, second} == {1, 2} and third == 0 and [one.place for one in found] == [1, 2, 3, None, None]
    assert [one.is_tied for one in found] == [False, True, False, False, False]
    assert [one.row.status for one in found[3:]] == ["stopped", "failed"] and best(found) == [found[0].row]
    assert found[2].low > 0 and found[2].difference == pytest.approx(0.5 / math.log(2) / 10, rel=0.4)


def test_with_one_document_no_trial_is_called_tied_or_better_than_another(tmp_path, capsys):
    """The paired bootstrap over one document has no width: whatever the difference is, it would be told apart from 0."""
    found = ranked(
        [row(0, {"a": 0}, [20.0], ci95_documents=None), row(1, {"a": 1}, [20.1], ci95_documents=None)],
        "bits_per_byte",
        None,
    )
    assert [(one.place, one.low, one.high, one.is_tied) for one in found] == [
        (1, None, None, False),
        (2, None, None, None),
    ]
    assert found[1].difference > 0
    sweep = Sweep(name="s", recipe="quickstart", space={"a": {"grid": [0, 1]}}, metric="bits_per_byte")
    report.write(sweep, found, [], tmp_path, 90.0)
    lines = json.loads((tmp_path / "results.json").read_text())
    assert [line["tied"] for line in lines] == [False, None] and pq.read_table(
        tmp_path / "results.parquet"
    ).to_pylist()[1]["tied"] is None
    assert "no interval" in (tmp_path / "report.html").read_text()
    console.print_sweep({"trials": lines}, "bits_per_byte", tmp_path)
    assert "no interval" in " ".join(capsys.readouterr().out.split())


def test_trials_are_compared_within_their_group_and_the_larger_is_better_for_speed():
    rows = [
        row(
            number,
            {"k": number % 2},
            [1.0],
            tokens_per_second=float(number),
            nelbo_variance=9.0 - number,
            variances=[9.0 - number] * 3,
        )
        for number in range(4)
    ]
    assert [one.number for one in best(ranked(rows, "tokens_per_second", None))] == [3]
    assert [one.number for one in best(ranked(rows, "nelbo_variance", "k"))] == [2, 3]


def test_a_trial_that_came_out_as_no_number_is_never_the_best(tmp_path):
    rows = [
        row(0, {"seed": 0}, [math.nan]),
        row(1, {"seed": 1}, [1.0]),
        row(2, {"seed": 2}, [math.inf]),
        row(3, {"seed": 3}, [0.9]),
    ]
    found = ranked(rows, "bits_per_byte", None)
    assert [(one.row.number, one.place) for one in found] == [(3, 1), (1, 2), (0, None), (2, None)]
    sweep = Sweep(name="s", recipe="quickstart", space={"seed": {"grid": [0, 1, 2, 3]}})
    report.write(sweep, found, [], tmp_path, 90.0)
    [only] = ranked(rows[1:2], "bits_per_byte", None)
    assert (only.place, only.difference, only.is_tied) == (1, 0.0, False)


def test_the_heat_map_shows_the_best_trial_of_each_interval(monkeypatch, tmp_path):
    """Whatever else the trials differ in; before, the worst of an interval stood for it."""
    clips, drawn = [None, {"beta": 0.3, "omega": 0.8}], []
    settings = [{"objective.clip": clip, "seed": seed} for seed in (0, 1) for clip in clips]
    rows = [
        row(i, own, [1.0], nelbo_variance=value, variances=[value] * 2)
        for i, (own, value) in enumerate(zip(settings, (4, 1, 2, 3), strict=True))
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
    report.write(sweep, ranked(rows, "nelbo_variance", None), [], tmp_path, 90.0)
    assert drawn == [{(0.0, 1.0): 2, (0.3, 0.8): 1}]


def test_the_files_say_what_was_found(tmp_path):
    clips = [None, {"beta": 0.3, "omega": 0.8}, {"beta": 0.5, "omega": 1.0}]
    rows = [
        row(i, {"objective.clip": clip}, [1.0 + i, 2.0], nelbo_variance=3.0 - i, variances=[3.0 - i, 3.1 - i])
        for i, clip in enumerate(clips)
    ]
    rows += [row(3, {"objective.clip": None}, [], "failed")]
    sweep = Sweep(
        name="s",
        recipe="quickstart",
        space={"objective.clip": {"grid": clips}},
        metric="nelbo_variance",
        confirm={"overrides": ["seed=1"]},
    )
    found = ranked(rows, "nelbo_variance", None)
    report.write(sweep, found, [rows[2]], tmp_path, 90.0)
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(line["number"], line["status"], line["place"]) for line in table] == [
        (2, "finished", 1), (1, "finished", 2), (0, "finished", 3), (3, "failed", None), (2, "confirmed", None),
    ]  # fmt: skip
    assert json.loads(table[0]["objective.clip"]) == clips[2] and table[0]["nelbo_variance"] == 1.0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 3  # heat map, parallel coordinates, curves
    assert "confirmed by a longer run" in text and "[0.5, 1]" in text
