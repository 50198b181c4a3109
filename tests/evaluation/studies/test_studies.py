"""Studies: the runner resumes, the statistics agree with tables, enumeration and simulation, and every arm runs."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from dlm_ray.evaluation.studies import annealing, block_size, draws, objectives, runner, setup, statistics, text8
from dlm_ray.evaluation.studies.comparison import compare, judge_orderings
from dlm_ray.evaluation.studies.report import write_report
from dlm_ray.evaluation.studies.runner import Arm, Outcome, Record, Study
from helpers.recipes import tiny_recipe

from dlm_ray.config.errors import Stopped, UserError
from dlm_ray.data.index import load_index
from dlm_ray.data.reading import read_split
from dlm_ray.data.tokenizer import load_tokenizer
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.training import loop

SLOW = pytest.mark.slow
FEW = {"NUM_LOSSES": 3, "NUM_GRADIENTS": 2}
STUDY = Study(
    name="toy",
    question="Which?",
    metric="bits",
    unit="bits",
    arms=(
        Arm("base", {"a": 1}, "1.00"),
        Arm("better", {"a": 2}, "<= 0.90"),
        Arm("same", {"a": 3}),
        Arm("other unit", {"a": 4}),
    ),
    seeds=(0, 1, 2, 3),
    baseline="base",
    ratios=("speed",),
    orderings=(
        ("better", "base", "table 1"),
        ("base", "better", "table 2"),
        ("same", "base", "table 3"),
        ("other unit", "base", "table 4"),
    ),
)


def outcome(arm, seed, folder):
    """Return an outcome that is 0.2 better for `better`, with a spread of 0.01 over seeds."""
    random = np.random.default_rng([seed, *arm.name.encode()])
    level = {"base": 1.0, "better": 0.8, "same": 1.0}.get(arm.name)
    if level is None:
        return Outcome({"speed": 2.0})
    documents = np.random.default_rng(7).uniform(5, 15, 40) * (level + 0.01 * random.normal(size=40))
    return Outcome({"bits": level + 0.01 * random.normal(), "speed": 1.0}, documents.tolist(), [10.0] * 40)


def test_a_stopped_study_resumes_where_it_stopped(tmp_path):
    completed = []

    def stops_at_6(arm, seed, folder):
        if len(completed) == 6:
            raise KeyboardInterrupt
        completed.append((arm.name, seed))
        return outcome(arm, seed, folder)

    with pytest.raises(KeyboardInterrupt):
        runner.run(STUDY, stops_at_6, tmp_path)
    assert [seed for _, seed in completed] == [0, 0, 0, 0, 1, 1]  # balanced: all arms of a seed first
    with (tmp_path / "results.jsonl").open("a") as lines:
        lines.write('{"study": "toy", "arm": "sa')  # the machine failed while it wrote a line
    messages, repeated = [], []
    records = runner.run(
        STUDY,
        lambda arm, seed, folder: repeated.append((arm.name, seed)) or outcome(arm, seed, folder),
        tmp_path,
        None,
        messages.append,
    )
    assert len(records) == 16 and len(repeated) == 10 and not set(repeated) & set(completed)
    assert any("the last line is incomplete" in message for message in messages)
    assert runner.run(STUDY, stops_at_6, tmp_path) == records  # nothing is left to run
    assert [json.loads(line)["study"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == ["toy"] * 16


def test_a_failed_run_is_listed_with_its_reason_and_is_repeated(tmp_path):
    def fails(arm, seed, folder):
        if (arm.name, seed) == ("same", 1):
            raise FloatingPointError("step 7 is not finite")
        return outcome(arm, seed, folder)

    records = runner.run(STUDY, fails, tmp_path)
    assert [(record.arm, record.seed, record.error) for record in records if record.error] == [
        ("same", 1, "FloatingPointError: step 7 is not finite")
    ]
    assert next(one for one in compare(STUDY, records) if one.arm == "same").n == 3
    text = write_report(STUDY, records, tmp_path / "report", "a machine", [])[0].read_text()
    assert "- same, seed 1: FloatingPointError: step 7 is not finite" in text
    assert not [one for one in runner.run(STUDY, outcome, tmp_path) if one.error]


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (Outcome({"bits": 1.0}, details={"x": {1}}), "TypeError: Object of type set is not JSON serializable"),
        (Outcome({"bits": float("nan")}), "FloatingPointError: bits is nan"),
        (None, "AttributeError: 'NoneType' object has no attribute 'metrics'"),
    ],
)
def test_an_outcome_that_json_cannot_hold_is_a_failed_run(tmp_path, result, error):
    assert {record.error for record in runner.run(STUDY, lambda arm, seed, folder: result, tmp_path)} == {error}


def test_metrics_may_be_numpy_numbers(tmp_path):
    records = runner.run(
        STUDY, lambda arm, seed, folder: Outcome({"bits": np.float32(1)}, np.ones(3, np.float32)), tmp_path
    )
    assert not any(record.error for record in records)
    assert {(one.arm, one.seed): one for one in runner.read(tmp_path)} == {(one.arm, one.seed): one for one in records}


def test_a_study_with_unknown_or_colliding_arms_is_refused():
    with pytest.raises(UserError, match="compares unknown arms .'nobody'."):
        Study(**{**vars(STUDY), "baseline": "nobody"})
    with pytest.raises(UserError, match="would share a folder"):
        Study(**{**vars(STUDY), "arms": (*STUDY.arms, Arm("Other-Unit", {}))})


def test_changed_settings_are_refused_and_named(tmp_path):
    runner.run(STUDY, outcome, tmp_path)
    changed = Study(**{**vars(STUDY), "arms": (*STUDY.arms[:1], Arm("better", {"a": 5}), *STUDY.arms[2:])})
    with pytest.raises(
        UserError, match="better .seed 0. with other settings: a was 2 and is now 5; choose another --out"
    ):
        runner.run(changed, outcome, tmp_path)


def test_no_run_starts_that_would_end_too_late(tmp_path, monkeypatch):
    clock = itertools.count(0, 20)  # every call takes 20 s, and so does a run
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(clock)))
    messages = []
    records = runner.run(STUDY, outcome, tmp_path, 2.0, messages.append)
    assert 1 <= len(records) < 6
    assert sum("skipped for lack of time" in message for message in messages) == 16 - len(records)


def test_seeds_and_documents_are_compared_separately(tmp_path):
    records = runner.run(STUDY, outcome, tmp_path)
    found = {(one.arm, one.over): one for one in compare(STUDY, records)}
    assert set(found) == {(arm, over) for arm in ("better", "same") for over in ("training seeds", "documents")}
    seeds, documents = found["better", "training seeds"], found["better", "documents"]
    assert seeds.n == 4 and documents.n == 40
    assert seeds.low < -0.2 < seeds.high < 0 and seeds.p_holm < 0.05
    assert documents.low < documents.difference < documents.high < -0.15 and documents.p_holm < 0.05
    assert found["same", "training seeds"].p_holm > 0.05
    assert 0 < found["same", "training seeds"].smallest_visible < 0.1


def test_published_orderings_hold_are_reversed_or_are_not_resolved(tmp_path):
    records = runner.run(STUDY, outcome, tmp_path)
    verdicts = {(one.better, one.worse): one.verdict for one in judge_orderings(STUDY, records)}
    assert verdicts == {
        ("better", "base"): "held",
        ("base", "better"): "reversed",
        ("same", "base"): "not resolved at this size",
        ("other unit", "base"): "not comparable",
    }


def test_the_report_lists_published_values_and_is_reproducible(tmp_path):
    records = runner.run(STUDY, outcome, tmp_path)
    paths = write_report(STUDY, records, tmp_path / "one", "two cores", ["a note"])
    text = paths[0].read_text()
    for part in (
        "| better | 4 | 0.8",
        "<= 0.90",
        "two cores",
        "seeds 0, 1, 2, 3",
        "(n 40)",
        "MDE 0.0",
        "- a note",
        "| better below base | table 1 |",
    ):
        assert part in text, part
    assert "speed (ratio to base)" in text and "| other unit | 4 | none |  |  | 2 |" in text
    again = write_report(STUDY, records, tmp_path / "two", "two cores", ["a note"])
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(paths, again, strict=True))
    numbers = json.loads(paths[2].read_text())
    assert len(numbers["runs"]) == 16 and "documents" not in numbers["runs"][0] and numbers["comparisons"]
    partial = write_report(STUDY, records[:3], tmp_path / "three", "two cores", [])[0].read_text()
    assert "- better, seed 3" in partial


@pytest.mark.parametrize(
    ("p", "dof", "expected"),
    [(0.975, 2, 4.303), (0.975, 10, 2.228), (0.95, 5, 2.015), (0.9, 1, 3.078), (0.995, 30, 2.750)],
)
def test_t_quantiles_agree_with_printed_tables(p, dof, expected):
    assert statistics.t_quantile(p, dof) == pytest.approx(expected, abs=6e-4)
    assert statistics.t_tail(expected, dof) == pytest.approx(2 * (1 - p), rel=2e-3)


def test_holm_agrees_with_a_worked_example():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_sign_flips_agree_with_enumeration_and_with_chance():
    differences = [0.3, -0.1, 0.4, 0.2]
    flips = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=4)
    ]
    assert statistics.sign_flip_p(differences) == pytest.approx(sum(flip >= 0.8 - 1e-9 for flip in flips) / 16)
    assert statistics.sign_flip_p([1.0, 1.0, 1.0]) == 0.25  # the least p of three pairs
    random = np.random.default_rng(0)
    assert statistics.sign_flip_p(random.normal(size=60)) > 0.05 > statistics.sign_flip_p(0.7 + random.normal(size=60))


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_minimum_detectable_effect_has_its_power_in_simulation(n):
    differences = np.resize([-1.0, 1.0], n)
    differences *= 0.3 / differences.std(ddof=1)
    effect = statistics.minimum_detectable_effect(differences)
    samples = np.random.default_rng(1).normal(effect, 0.3, (100_000, n))
    t = samples.mean(1) / (samples.std(1, ddof=1) / math.sqrt(n))
    assert np.mean(np.abs(t) > statistics.t_quantile(0.975, n - 1)) == pytest.approx(0.8, abs=0.005)


def test_intervals_cover_the_mean_in_95_percent_of_samples():
    random = np.random.default_rng(2)
    covered = [
        low < 1.0 < high for _, low, high in (statistics.t_interval(random.normal(1.0, 0.5, 4)) for _ in range(400))
    ]
    assert 0.92 < np.mean(covered) < 0.98
    low, high = statistics.bootstrap_interval(random.normal(1.0, 0.5, 200))
    assert low < 1.0 < high and high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), rel=0.2)
    assert statistics.t_interval([2.0]) == (2.0, None, None) and statistics.t_test_p([2.0]) is None


def test_one_document_has_no_interval_over_documents(tmp_path):
    assert statistics.bootstrap_interval([1.5]) is None
    assert statistics.bootstrap_interval([1.5, 0.2], [10.0, 0.0]) is None

    def of_one_document(arm, seed, folder):
        whole = outcome(arm, seed, folder)
        return Outcome(whole.metrics, whole.documents and whole.documents[:1], whole.weights and whole.weights[:1])

    records = runner.run(STUDY, of_one_document, tmp_path)
    [found] = [one for one in compare(STUDY, records) if one.arm == "better" and one.over == "documents"]
    assert found.n == 1 and found.low is None and found.high is None and found.difference < 0
    assert write_report(STUDY, records, tmp_path / "report", "a machine", [])


def test_text8_form_has_letters_and_single_spaces():
    assert text8.text8_form("Hello, World 42!\n\tNo_2") == "hello world four two no two"
    assert text8.text8_form("é--x") == "x"


@pytest.fixture(scope="module")
def text8_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text8")
    text8.build_data(folder, 32, max_bytes=2**17)
    return folder


def test_a_text8_token_is_a_character(text8_folder):
    data = str(text8_folder / "data")
    tokenizer = load_tokenizer(f"{data}/tokenizer")
    index = load_index(data)
    assert index.tokenizer.vocab_size == 28 and index.tokenizer.start_id == index.tokenizer.end_id == 27
    sequence = read_split(data, "train", 1)[0]
    text = tokenizer.decode([token for token in sequence.input_ids.tolist() if token < 27])
    assert text8.text8_form(text) == text.strip()
    assert (sequence.num_bytes == (sequence.input_ids < 27)).all()
    corpus = json.loads((text8_folder / "corpus.json").read_text())
    assert text8.build_data(text8_folder, 32) == corpus  # it is built once


def some_or_all(*names):
    """Parametrize a test with the named arms of a study, and with all of its arms as a slow test."""
    return pytest.mark.parametrize("names", [pytest.param(names, id="some"), pytest.param((), id="all", marks=SLOW)])


def with_arms(study, names):
    """Return the study with the named arms and the orderings between them, or the whole study without names."""
    if not names:
        return study
    return replace(
        study,
        arms=tuple(arm for arm in study.arms if arm.name in names),
        orderings=tuple(ordering for ordering in study.orderings if {*ordering[:2]} <= {*names}),
    )


@pytest.mark.long
@some_or_all("AR", "MD4", "SSD-LM")
def test_arms_of_the_objectives_study_run_from_training_to_the_table(names, text8_folder, tmp_path, monkeypatch):
    """Each arm takes two steps on four sequences; the rest is the committed study."""
    for name, value in {
        "SEQUENCE_LENGTH": 32,
        "BATCH_SIZE": 4,
        "BASE_STEPS": 2,
        "HELD_OUT_SEQUENCES": 8,
        "DRAWS_PER_SEQUENCE": 2,
        **FEW,
    }.items():
        monkeypatch.setattr(setup, name, value)
    monkeypatch.setattr(objectives, "TIMESTEPS", (10,))
    data, base = str(text8_folder / "data"), str(tmp_path / "base")
    loop.fit(setup.base_recipe(data), base)
    small = with_arms(objectives.build_study(1, 2), names)
    records = runner.run(
        small, lambda arm, seed, folder: objectives.run_arm(arm, seed, folder, data, base), tmp_path / "study"
    )
    assert [record.error for record in records] == [None] * len(small.arms)
    by_arm = {record.arm: record for record in records}
    assert all(
        (record.metrics.get("bits_per_character") is None) == (arm == "SSD-LM") for arm, record in by_arm.items()
    )
    parts = by_arm["MD4"].details["by_timesteps"]
    assert set(parts) == {"10", "continuous, shifted", "continuous"} and parts["10"]["prior"] > 0
    sequences = read_split(data, "held_out", 8)
    document_ids = np.stack([sequence.document_ids for sequence in sequences])
    scored = maskable_positions(document_ids).sum()  # neither start tokens nor padding
    nats = 1e-4 * math.log(28) * scored
    assert parts["10"]["reconstruction"] == pytest.approx(
        nats / math.log(2) / sum(sequence.num_bytes.sum() for sequence in sequences), rel=1e-6
    )
    assert by_arm["AR"].metrics["nelbo_variance"] < 1e-12 < by_arm["MD4"].metrics["nelbo_variance"]
    corpus = json.loads((text8_folder / "corpus.json").read_text())
    text = write_report(small, records, tmp_path / "report", "two cores", objectives.notes(records, corpus, 2))[
        0
    ].read_text()
    assert "MD4, seed 0, evaluated at T = 10" in text and "| SSD-LM | 1 | none |" in text


def test_a_bound_in_T_steps_is_evaluated_at_its_own_times():
    """At T = 1 everything is masked with weight 1; the reported bound is over all of t instead."""
    maskable = np.ones((4, 9), dtype=bool)
    maskable[:, 0] = False
    keys = [(0, row) for row in range(4)]
    draw = objectives.OwnTimes(Absorbing(num_timesteps=1)).evaluation_draw(
        0, keys, np.linspace(0.1, 0.9, 4), maskable, maskable
    )
    assert np.array_equal(draw.is_masked.numpy(), maskable) and (draw.weight[: draw.num_scored] == 1).all()


@pytest.mark.long
@some_or_all("row (128)", "4", "1, linear", "1, all masked", "4, from scratch", "AR, from scratch")
def test_arms_of_the_block_size_study_run_from_training_to_the_table(names, tmp_path, monkeypatch):
    few = {"BATCH_SIZE": 2, "BASE_STEPS": 2, "HELD_OUT_SEQUENCES": 4, "DRAWS_PER_SEQUENCE": 2, **FEW}
    for name, value in few.items():
        monkeypatch.setattr(setup, name, value)
    monkeypatch.setattr(block_size, "WHOLE_SEQUENCE_STEPS", 2)
    monkeypatch.setattr(block_size, "SEARCHED_SIZES", (4, 128))
    corpus = text8.build_data(tmp_path / "text8", 128, max_bytes=2**17)
    data = str(tmp_path / "text8" / "data")
    loop.fit(setup.base_recipe(data), tmp_path / "base")
    base = block_size.whole_sequence_base(data, str(tmp_path / "base"), tmp_path / "whole")
    small = with_arms(block_size.build_study(1, 2), names)
    records = runner.run(
        small, lambda arm, seed, folder: block_size.run_arm(arm, seed, folder, data, base), tmp_path / "study"
    )
    assert [record.error for record in records] == [None] * len(small.arms)
    steps = {record.arm: record.details["steps"] for record in records}
    assert steps["4"] == 2 and steps["4, from scratch"] == steps["AR, from scratch"] == 6
    by_arm = {record.arm: record.metrics for record in records}
    assert by_arm["1, all masked"]["nelbo_variance"] < 1e-12 < by_arm["1, linear"]["nelbo_variance"]
    clip_lines = block_size.search_clips(base, data, tmp_path / "report", num_sequences=2, num_draws=1)
    assert len(clip_lines) == 3 and (tmp_path / "report/clips_128/clip_search.svg").exists()
    written = write_report(
        small, records, tmp_path / "report", "two cores", [*block_size.notes(corpus, 2), *clip_lines]
    )
    assert "Clip search on the base, blocks of 4" in written[0].read_text()


@pytest.mark.parametrize(
    ("middles", "verdict"),
    [
        ((0.7, 0.5), "heavier masking held."),
        ((0.75, 0.75), "did not hold"),
        ((0.5, 0.7), "did not hold"),
        ((0.7, 0.8, 0.5), "not at every step"),
    ],
)
def test_the_clip_search_reports_whether_smaller_blocks_chose_heavier_masking(monkeypatch, middles, verdict):
    monkeypatch.setattr(block_size, "SEARCHED_SIZES", (4, 16, 128)[: len(middles)])
    assert verdict in block_size.clip_verdict(middles)


@pytest.mark.long
def test_every_arm_of_the_annealing_study_ends_at_whole_sequences(data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(annealing, "HELD_OUT_SEQUENCES", 8)
    monkeypatch.setattr(annealing, "GROWING_SIZES", (4, 8, 16))
    data, sequence_length = str(data_folder), load_index(str(data_folder)).sequence_length
    base = loop.fit(tiny_recipe(data_folder, objective__name="autoregressive"), str(tmp_path / "base"))["checkpoint"]
    small = annealing.build_study(1, 6, sequence_length)
    for arm in small.arms:
        recipe = setup.complete_recipe(arm.settings, arm.name, data, {"base": base})
        assert recipe.objective.block_tokens in (None, sequence_length) and recipe.objective.shift == (
            "no shift" not in arm.name
        )
        assert (
            sum(stage.steps for stage in recipe.curriculum.block_sizes) + recipe.curriculum.annealing.steps
            < recipe.training.steps
        )
    records = runner.run(
        small, lambda arm, seed, folder: annealing.run_arm(arm, seed, folder, data, base), tmp_path / "study"
    )
    assert [record.error for record in records] == [None] * 10
    # In six steps, 10 % and 30 % are both three steps, one per block size; all other schedules differ.
    assert len({record.metrics["bits_per_byte"] for record in records}) == 8
    assert len(annealing.notes(base, data, 6)) == 3


def test_a_run_stopped_by_a_signal_is_not_a_failed_run(tmp_path):
    def stopped(arm, seed, folder):
        raise Stopped("the state is committed")

    with pytest.raises(Stopped):
        runner.run(STUDY, stopped, tmp_path)
    assert len(runner.run(STUDY, outcome, tmp_path)) == 16


def test_a_record_is_restored_from_its_line():
    record = Record("s", "a", 0, "f", {"x": [1]}, "2026-11-21", 1.5, {"bits": 1.0}, [1.0], [2.0], {"d": None})
    assert Record(**json.loads(json.dumps(vars(record)))) == record


@pytest.mark.long
def test_every_arm_of_the_draws_study_is_measured_on_trained_models(text8_folder, tmp_path, monkeypatch):
    for name, value in {"BATCH_SIZE": 4, **FEW}.items():
        monkeypatch.setattr(draws, name, value)
    monkeypatch.setattr(setup, "SEQUENCE_LENGTH", 32)
    (tmp_path / "text8").symlink_to(text8_folder)
    with pytest.raises(UserError, match="does not exist; run"):
        draws.run_arm(draws.STUDY.arms[0], 0, tmp_path)
    base = setup.base_recipe(str(text8_folder / "data"))
    loop.fit(
        base.model_copy(
            update={"objective": type(base.objective)(), "training": base.training.model_copy(update={"steps": 2})}
        ),
        tmp_path / "runs/md4-0",
    )
    for arm in draws.STUDY.arms:
        measured = draws.run_arm(arm, 0, tmp_path).metrics
        assert measured["nelbo_variance"] > 0 and measured["gradient_variance"] > 0, arm.name
