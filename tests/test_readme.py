"""README: its Python runs as it stands, its commands exist, its files are there."""

import re
from pathlib import Path

import pytest
from helpers.commands import dlm_ray
from helpers.data import make_data
from helpers.recipes import tiny_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"^dlm-ray (data \w+|checkpoint \w+|\w+)", README, re.M))))
def test_every_verb_that_is_shown_exists(verb):
    assert dlm_ray(*verb.split(), "--help").returncode == 0


def test_every_file_that_is_named_is_there():
    paths = re.findall(r"`((?:dlm_ray|configs|evaluation|tests|cluster|\.ci)/[\w./-]*)`", README)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_make_has_the_targets_that_are_shown():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", README, re.M)) | set(re.findall(r"`make (\w+)", README)) <= targets
