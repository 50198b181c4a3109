"""`torchrun -m dlm_ray.training RECIPE [key=value ...] [--out runs]`: train without Ray; SIGTERM exits with 75."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from dlm_ray.config.errors import Stopped, UserError
from dlm_ray.config.load import load_recipe, run_name
from dlm_ray.config.paths import folder_argument
from dlm_ray.training.loop import fit


def main() -> int:
    """Run the recipe in this process, or in the processes that torchrun started."""
    parser = argparse.ArgumentParser(prog="python -m dlm_ray.training", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=folder_argument, default=Path("runs"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        result = fit(recipe, arguments.out.absolute() / run_name(recipe))
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 75
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{result['checkpoint']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
