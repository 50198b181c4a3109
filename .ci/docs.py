"""Write the API reference into build/docs, one page per module, from the docstrings; `make docs` runs it."""

import importlib
import shutil
import sys
import warnings
from pathlib import Path

import pdoc

import dlm_ray

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "docs"


def module_names() -> list[str]:
    """Return the import name of every module of the package; in a checkout `evaluation/` is `dlm_ray.evaluation`."""
    names = []
    for path in sorted([*ROOT.glob("dlm_ray/**/*.py"), *ROOT.glob("evaluation/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        names.append(".".join(parts if parts[0] == "dlm_ray" else ("dlm_ray", *parts)))
    return names


def main() -> None:
    """Write the API reference to build/docs."""
    for name in dlm_ray.__all__:  # imported on first use, which pdoc does not trigger
        setattr(dlm_ray, name, getattr(dlm_ray, name))
    names = module_names()
    for name in names:
        importlib.import_module(name)
    dlm_ray.__all__ = [*dlm_ray.__all__, *sorted({name.split(".")[1] for name in names if "." in name})]
    shutil.rmtree(OUT, ignore_errors=True)
    pdoc.render.configure(docformat="google", show_source=True)
    # pdoc finds some modules twice, and cannot resolve the annotations of a constructor that a dataclass inherits.
    warnings.filterwarnings("ignore", message="The module specification|Error parsing type annotation")
    pdoc.pdoc(*names, output_directory=OUT)
    sys.stdout.write(f"{len(names)} modules: {OUT / 'index.html'}\n")


if __name__ == "__main__":
    main()
