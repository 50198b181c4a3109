"""README: one screen that is true. Its Python runs as it stands, and its numbers are those of the committed result."""

import json
import re
from pathlib import Path

import pytest
from dlm_ray.evaluation import picture
from helpers.data import make_data
from helpers.recipes import tiny_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULT = ROOT / "evaluation/results/quickstart_smollm2_cpu-2-cores_2026-11-25.json"


@pytest.mark.ray
def test_the_python_api_in_ten_lines(ray_session, tmp_path, monkeypatch, capsys):
    from dlm_ray.training import loop

    [program] = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in program.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data")
    loop.fit(tiny_recipe("data", "base", objective__name="autoregressive"), tmp_path / "runs/base")
    exec(compile(program, "README.md", "exec"), {})
    interval, samples, infilled = capsys.readouterr().out.strip().splitlines()
    assert interval.startswith("(") and samples.startswith("[") and infilled.startswith("[")


def test_readme_has_at_most_130_lines():
    assert len(README.splitlines()) <= 130


def test_the_numbers_of_readme_are_those_of_the_committed_result():
    result = json.loads(RESULT.read_text())
    prose = " ".join(README.split())
    for name, score in result["scores"].items():
        assert f"{score['bits_per_byte']:.2f}" in prose, name
    difference = result["paired"]["adapted_minus_continued"]
    low, high = difference["ci95_documents_paired"]
    assert f"difference {difference['bits_per_byte']:+.2f}, 95 % {low:+.2f} to {high:+.2f} over documents" in prose
    assert f"{result['seconds']['in_all'] / 60:.0f} minutes" in prose and result["command"] in prose
    answer = result["answers"][0]["adapted"]
    assert answer["text"] in prose and f"{answer['tokens_per_forward']:.2f} tokens per network call" in prose
    scratch = json.loads((ROOT / "evaluation/results/quickstart_cpu-2-cores_2026-11-21.json").read_text())
    assert all(f"{scratch[name]['bits_per_byte']:.2f}" in prose for name in ("adapted", "scratch"))


def test_the_figure_of_readme_shows_the_committed_result(tmp_path):
    shown = RESULT.with_suffix(".svg")
    assert f"({shown.relative_to(ROOT)})" in README
    copy = tmp_path / RESULT.name
    copy.write_bytes(RESULT.read_bytes())
    drawn = picture.draw(copy).read_text()
    texts = [re.findall(r">([^<>\n]+)</text>", svg) for svg in (shown.read_text(), drawn)]
    assert texts[0] == texts[1] and "1.461" in texts[0]


def test_the_map_of_readme_lists_every_room_of_the_package():
    rooms = {path.parent.name for path in (ROOT / "dlm_ray").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^  (\w+)/ ", README, re.MULTILINE))
