"""What is typed: fast help without heavy imports, exit codes, one JSON object, messages without tracebacks."""

import json
import subprocess
import sys
import time

import pytest
from helpers.commands import dlm_ray
from helpers.processes import ForkedModule


def test_help_comes_in_under_a_second_and_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['dlm-ray', '--help']; from dlm_ray.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
    )
    program += (
        "print([name for name in ('torch', 'ray', 'transformers', 'matplotlib', 'tensorstore') if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):  # the machine may be busy once
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert done.stdout.strip().endswith("[]")
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1
    for verb in (
        "quickstart",
        "train",
        "sample",
        "eval",
        "export",
        "convert",
        "data",
        "checkpoint",
        "schema",
        "doctor",
        "serve",
    ):
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "quickstart", "training.stps=3"], 2, "did you mean training.steps?"),
        (["train", "no-such-recipe"], 2, "there is no recipe"),
        (["trian"], 2, "No such command"),
        (["sample", "/nowhere", "--prefix", "a"], 2, "go together"),
        (["sample", "/nowhere", "--prefix", "a", "--suffix", "b"], 2, "--length is missing"),
        (["data", "inspect", "/nowhere"], 2, "is not a data folder"),
        (["data", "build", "/nowhere", "--out", "/tmp/never", "--train-tokenizer", "300"], 2, "not a file, a folder"),
        (["data", "build", "/nowhere", "--out", "/tmp/never"], 2, "one of --tokenizer"),
        (["export", "/nowhere", "/tmp/never"], 2, "is not a checkpoint"),
        (["convert", "/nowhere.gguf", "/tmp/never"], 2, "is no file here"),
        (["convert", "/nowhere", "/tmp/never.gguf"], 2, "would be a GGUF file, which dlm_ray only reads"),
        (["checkpoint", "verify", "/nowhere"], 1, "is not a checkpoint"),
        (["schema", "serve"], 2, "allowed is recipe, sweep, server"),
    ],
)
def test_mistakes_exit_with_their_code_and_one_message(arguments, code, message):
    done = dlm_ray(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.message
    assert "Traceback" not in done.stderr and not done.stdout


def test_debug_shows_the_traceback():
    assert "Traceback" in dlm_ray("--debug", "data", "inspect", "/nowhere").stderr


def test_json_is_one_object_on_stdout():
    recipe = json.loads(dlm_ray("train", "quickstart_base", "--dry-run", "--json").stdout)
    assert recipe["objective"]["name"] == "autoregressive"
    assert json.loads(dlm_ray("schema", "recipe").stdout)["title"] == "Recipe"
    assert json.loads(dlm_ray("doctor", "--json").stdout)["cores"] >= 1


def test_doctor_checks_whether_a_family_can_be_adapted():
    good = json.loads(dlm_ray("doctor", "llama", "--json").stdout)
    assert set(good.values()) == {"good", "yes"}
    bad = dlm_ray("doctor", "falcon", "--json")
    assert bad.returncode == 1 and "KeyError" in json.loads(bad.stdout)["builds"]


@pytest.mark.long
def test_python_m_dlm_ray_is_the_command(tmp_path):
    code, _, stderr = ForkedModule(tmp_path, "dlm_ray", "trian").wait()
    assert code == 2 and "No such command" in stderr


def test_an_unknown_family_is_named_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    done = dlm_ray("eval", tmp_path, "--data", "x")
    assert done.returncode == 2 and "supported families are gpt2, llama, qwen2, qwen3, mistral" in done.message
