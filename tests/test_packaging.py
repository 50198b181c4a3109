"""The wheel holds everything that runs, and nothing beside the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

import dlm_ray.configs
import dlm_ray.evaluation

ROOT = Path(__file__).parent.parent


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
