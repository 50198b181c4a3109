"""The layers of the package.

Imports go down, Ray stays in runtime, transformers in models and the tokenizer, files say what they are for.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"config", "report", "diffusion"},
    {"models"},
    {"data", "checkpoint"},
    {"training", "generation"},
    {"serving"},
    {"evaluation"},
    {"runtime"},
    {"cli"},
    {"__main__", "__init__"},
]
FILES = sorted([*(ROOT / "dlm_ray").rglob("*.py"), *(ROOT / "evaluation").rglob("*.py")])


def room(path):
    parts = path.relative_to(ROOT).parts
    return "evaluation" if parts[0] == "evaluation" else parts[1].removesuffix(".py")


def floor(name):
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "dlm_ray" else [node.module]
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = room(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "dlm_ray":
            assert rest, f"{path}: imports the package itself"
            if rest[0] != own:
                assert floor(rest[0]) < floor(own), f"{own} imports {rest[0]}"
        if own == "diffusion":
            assert top not in ("dlm_ray",) or rest[0] == "diffusion", "diffusion imports nothing of ours"
        if top == "ray":
            assert own == "runtime", f"{own} imports ray"
        if top == "transformers" and own != "models":
            assert path.name == "tokenizer.py", f"{path} imports transformers"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_is_for(path):
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), "no docstring"


def test_the_floors_are_all_the_rooms_there_are():
    assert {room(path) for path in FILES} <= set().union(*FLOORS)
