"""Examples in Markdown files run, or are checked by the code that would run them; named paths and keys exist."""

import ast
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml
from helpers.data import make_data

from dlm_ray.cli.main import app
from dlm_ray.config.load import read_tree, shipped, validate
from dlm_ray.config.mistakes import all_keys
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.server import Server
from dlm_ray.config.server_file import load_server
from dlm_ray.config.sweep import Sweep
from dlm_ray.config.sweep_load import load_sweep
from dlm_ray.config.trees import set_key
from dlm_ray.serving.http import protocol

ROOT = Path(__file__).parent.parent
IGNORED = {".venv", "build", "dist", "runs", "results", ".pytest_cache"}
FILES = sorted(path for path in ROOT.rglob("*.md") if not IGNORED & set(path.relative_to(ROOT).parts))
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
KEYS = {key for model in (Recipe, Sweep, Server) for key in all_keys(model)}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


def fenced(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def inline(text):
    """Code between single backticks, without fenced blocks; a line break counts as a space."""
    prose = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(text, program):
    """Command lines of `program` in blocks without a language and in inline code, each split into words."""
    lines = [line for block in fenced(text, "") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *inline(text)]:
        words = shlex.split(line, comments=True) if line.startswith(f"{program} ") else []
        if len(words) > 1:
            yield [word for word in words if word != "..."]


def everywhere(find):
    return sorted({(name, shlex.join(words)) for name, text in TEXTS.items() for words in find(text)})


def parse(command, words):
    """Parse as the command line does; return the parameters of the command that would run."""
    context = command.make_context("dlm-ray", list(words))
    if not hasattr(command, "commands"):
        return context.params
    name, child, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return {"command": name, **parse(child, rest)}


def check_recipe(name, overrides):
    """The recipe is valid; a file that is not shipped stands for any recipe."""
    tree = read_tree(name if name.removesuffix(".yaml") in shipped() else "quickstart")
    problems = [problem for override in overrides if override != "key=value" for problem in set_key(tree, override)]
    assert not problems
    validate(tree, name)


@pytest.mark.parametrize(("file", "line"), everywhere(lambda text: commands(text, "dlm-ray")))
def test_the_command_line_accepts_every_command_that_is_shown(file, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[1:]
    if words == ["--help"]:
        return
    if words[-1] == "--help":
        words.pop()
    group = typer.main.get_command(app)
    if words == ["serve"] or words[0] in ("data", "checkpoint") and len(words) == 2 or len(words) == 1:
        assert words[0] in group.commands  # the name of a command, without arguments
        return
    params = parse(group, words)
    overrides = params.get("overrides") or []
    if params["command"] == "train":
        check_recipe(params["recipe"], overrides)
    elif words[0] == "serve":
        load_server(params["target"], overrides)
    elif words[0] == "sweep" and "sweep" in params:
        load_sweep(params["sweep"], overrides)


@pytest.mark.parametrize(("file", "line"), everywhere(lambda text: commands(text, "python")))
def test_every_module_that_is_run_exists_and_has_the_options_that_are_shown(file, line):
    words = shlex.split(line)
    assert words[1] == "-m"
    spec = importlib.util.find_spec(words[2])
    assert spec is not None, words[2]
    folder = Path(spec.origin).parent
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    for option in (word for word in words[3:] if word.startswith("--")):
        assert f'"{option}"' in source, option


def test_make_has_every_target_that_is_shown():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {words[1] for text in TEXTS.values() for words in commands(text, "make")}
    assert {"quickstart", "test", "test-fast", "docs"} <= shown <= targets


@pytest.mark.parametrize("file", TEXTS)
def test_every_path_and_every_link_leads_somewhere(file):
    text, folder = TEXTS[file], (ROOT / file).parent
    rooms = r"(?:dlm_ray|configs|evaluation|tests|cluster|\.ci)/[\w./*-]*"
    for path in (code for code in inline(text) if re.fullmatch(rooms, code)):
        assert list(ROOT.glob(path.rstrip("/"))), path
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / file
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, link


@pytest.mark.parametrize("file", [name for name in TEXTS if name != "CHANGELOG.md"])
def test_every_configuration_key_that_is_named_exists(file):
    named = [re.match(r"[a-z_]+(?:\.[a-z_]+)+", code) for code in inline(TEXTS[file])]
    keys = {match[0] for match in named if match and match[0].partition(".")[0] in SECTIONS}
    files = {key for key in keys if key.rpartition(".")[2] in ("py", "jsonl", "yaml")}
    assert keys - files <= KEYS, keys - files - KEYS


def test_the_keys_of_the_recipe_table_are_those_of_a_recipe():
    table = TEXTS["configs/README.md"].partition("| key | what it contains |")[2].partition("\n\n")[0]
    named = [
        key for line in table.splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    ]
    assert named == list(Recipe.model_fields)


def test_the_old_names_of_the_changelog_are_gone_and_the_new_ones_exist():
    table = TEXTS["CHANGELOG.md"].partition("| old | new |")[2]
    pairs = [
        [re.findall(r"`([\w.]+)`", cell) for cell in line.split("|")[1:3]] for line in table.splitlines() if "|" in line
    ]
    old, new = ({key for pair in pairs for key in pair[side] if "." in key} for side in (0, 1))
    new = {key for key in new if key.partition(".")[0] in SECTIONS}
    old = {key for key in old if key.partition(".")[0] in SECTIONS}
    assert len(old) >= 12 and len(new) >= 12
    assert new <= KEYS and not old & KEYS


def definitions(path):
    """Map each function, class and method of a file, as `name` or `Class.name`, to its source."""
    text = path.read_text()
    nodes = [(node.name, node) for node in ast.parse(text).body if hasattr(node, "name")]
    nodes += [(f"{name}.{inner.name}", inner) for name, node in nodes for inner in node.body if hasattr(inner, "name")]
    return {name: ast.get_source_segment(text, node) for name, node in nodes}


def test_every_function_that_the_architecture_page_names_is_in_its_file():
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXTS["dlm_ray/README.md"])
    assert len(named) > 20
    for file, name in named:
        assert name in definitions(ROOT / "dlm_ray" / file), (file, name)


def test_every_reason_to_refuse_a_checkpoint_is_quoted_from_the_file_that_checks_it():
    [table] = re.findall(r"## Why a checkpoint is refused\n(.*?)\n## ", TEXTS["dlm_ray/README.md"], re.DOTALL)
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ") and ".py:" in line]
    assert len(rows) > 10
    for _, messages, checked, _ in rows:
        [file] = re.findall(r"`([\w/]+\.py):", checked)
        source = re.sub(r'"\s*f?"', "", (ROOT / "dlm_ray" / file).read_text())  # a string over several lines
        for message in re.findall("`([^`]+)`", messages):
            words = message.rstrip(":")
            assert words in source, (file, message)


@pytest.mark.parametrize("file", TEXTS)
def test_prose_has_at_most_100_columns_and_code_120(file):
    in_code = False
    for number, line in enumerate(TEXTS[file].splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        if not line.startswith("|") and "](" not in line:
            assert len(line) <= (120 if in_code else 100), f"{file}:{number}"


def test_yaml_blocks_are_valid_recipes():
    blocks = [block for text in TEXTS.values() for block in fenced(text, "yaml")]
    assert blocks
    for block in blocks:
        validate(yaml.safe_load(block), "a yaml block")


def test_requests_to_the_service_are_valid():
    text = TEXTS["configs/serve/README.md"]
    [body] = re.findall(r"-d '(\{.*\})'", text)
    assert protocol.Completion.model_validate(json.loads(body)).max_tokens == 40
    [block] = fenced(text, "py")
    calls = []

    class OpenAI:
        def __init__(self, base_url, api_key):
            self.completions = self

        def create(self, extra_body, **fields):
            calls.append(protocol.Completion.model_validate({**fields, **extra_body}))

    exec(compile(block, "configs/serve/README.md", "exec"), {"openai": type("openai", (), {"OpenAI": OpenAI})})
    assert calls[0].threshold == 0.8


def test_the_examples_of_how_to_extend_it_run(tmp_path, monkeypatch, capsys):
    make_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = fenced(TEXTS["dlm_ray/README.md"], "python")
    assert len(blocks) == 5
    for block in blocks:
        name = re.match(r"# (\w+)\.py\n", block)
        if name:
            Path(f"{name[1]}.py").write_text(block)
        exec(compile(block, "dlm_ray/README.md", "exec"), {"__name__": "example"})
    assert 0 < float(capsys.readouterr().out) < 20
    assert "my_objectives" in sys.modules
    del sys.modules["my_objectives"]
