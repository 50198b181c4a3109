"""The wheel holds everything that runs and nothing else; its declared dependencies are the imported packages."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import dlm_ray.configs
import dlm_ray.evaluation
import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = importlib.metadata.packages_distributions()
COMMAND_LINE_TOOLS = {"ruff", "mypy", "types-pyyaml", "codespell", "pre-commit"}


def normalized(requirement):
    """The name in a requirement, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def imported_distributions(*folders, top_level_only=False):
    """Third-party distributions that the Python files below `folders` import; with `top_level_only` at module level."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body if top_level_only else ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    local = {"dlm_ray", "helpers", *(path.stem for path in ROOT.glob("tests/**/*.py"))}
    names -= sys.stdlib_module_names | local
    return {normalized(DISTRIBUTIONS.get(name, [name])[0]) for name in names}


CORE = {normalized(requirement) for requirement in PROJECT["dependencies"]}
EXTRAS = {
    extra: {normalized(requirement) for requirement in requirements} - {"dlm-ray"}
    for extra, requirements in PROJECT["optional-dependencies"].items()
}


def test_every_imported_package_is_a_declared_dependency():
    optional = set().union(*(packages for extra, packages in EXTRAS.items() if extra != "dev"))
    assert imported_distributions("dlm_ray", "evaluation") <= CORE | optional
    assert imported_distributions("dlm_ray", "evaluation", top_level_only=True) <= CORE
    assert imported_distributions("tests", ".ci") <= CORE | optional | EXTRAS["dev"]


def test_every_declared_dependency_is_imported():
    package, development = imported_distributions("dlm_ray", "evaluation"), imported_distributions("tests", ".ci")
    for extra, packages in {"core": CORE, **EXTRAS}.items():
        used = development | COMMAND_LINE_TOOLS if extra == "dev" else package
        assert packages <= used, f"{extra}: nothing imports {packages - used}"


def test_ray_is_bounded_by_its_minor_version_while_a_private_module_is_imported():
    private = [path for path in (ROOT / "dlm_ray").rglob("*.py") if "_internal" in path.read_text()]
    [requirement] = [one for one in PROJECT["dependencies"] if normalized(one) == "ray"]
    assert bool(private) == ("<2.61" in requirement)


def test_every_tested_version_satisfies_the_declared_dependencies():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pins = {normalized(name): version for name, version in pinned.items()}
    requirements = [
        *PROJECT["dependencies"],
        *(one for many in PROJECT["optional-dependencies"].values() for one in many),
    ]
    for requirement in requirements:
        for version in re.findall(r">=([\d.]+)", requirement):
            pin = pins.get(normalized(requirement))
            assert pin is None or tuple(map(int, pin.split(".")[:2])) >= tuple(map(int, version.split(".")[:2])), (
                requirement
            )
    assert CORE - {"flash-attn"} <= pins.keys(), CORE - pins.keys()


def test_the_wheel_carries_evaluation_configs_and_cluster_inside_the_package(tmp_path):
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dlm_ray", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    for path in [*ROOT.glob("dlm_ray/**/*.py"), *ROOT.glob("evaluation/**/*.py")]:
        inside = str(path.relative_to(ROOT)).replace("evaluation/", "dlm_ray/evaluation/")
        assert inside in names, f"{inside} is missing from the wheel"
    assert "dlm_ray/configs/quickstart.yaml" in names and "dlm_ray/cluster/__init__.py" in names


def test_a_checkout_has_the_same_import_names():
    assert Path(dlm_ray.evaluation.__file__).parent == ROOT / "evaluation"
    assert (Path(dlm_ray.configs.__file__).parent / "quickstart.yaml").is_file()
