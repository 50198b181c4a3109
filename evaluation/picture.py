"""`python -m dlm_ray.evaluation.picture REPORT.json`: draw the figure of README from a committed quickstart report.

The figure lies beside the report, with the same dated name and the ending .svg; the same report gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.report import intervals

# Of a quickstart on a pretrained model, and of one from 2026-11-21 on its own base.
PRETRAINED = {
    "base": "{base} (exact)",
    "continued": "the same, continued on the same tokens (exact)",
    "adapted": "the same, adapted to block diffusion (bound)",
}
OWN = {
    "ar": "AR base (exact)",
    "adapted": "AR base adapted to diffusion (bound)",
    "unadapted": "AR base as a denoiser, not adapted (bound)",
    "scratch": "diffusion from scratch, same tokens (bound)",
}


def rows(report: JsonObject) -> list[tuple[str, float, float, float]]:
    """Return (label, bits per byte, low, high) per model, the best first; the interval is over documents."""
    if "scores" in report:
        labels = {name: label.format(base=report["base"]["name"]) for name, label in PRETRAINED.items()}
        return _sorted(report["scores"], labels)
    models = _sorted(report, OWN)
    unigram = report["unigram_bits_per_byte"]
    return [*models, ("frequencies of single tokens", unigram, unigram, unigram)]


def _sorted(scores: JsonObject, labels: dict[str, str]) -> list[tuple[str, float, float, float]]:
    """Return the rows of some models, the best first."""
    models = [(label, scores[name]["bits_per_byte"], *scores[name]["ci95_documents"]) for name, label in labels.items()]
    return sorted(models, key=lambda row: row[1])


def draw(path: Path) -> Path:
    """Write the figure of the report at `path` and return its path.

    Args:
        path: the report.json of a quickstart, under its dated name in evaluation/results.
    """
    report = json.loads(path.read_text())
    hardware = f"{report['hardware']['cores']} CPU cores, {report['seconds']['in_all'] / 60:.0f} minutes"
    figure = intervals(
        rows(report),
        "bits per byte of held-out text, lower is better; 95 % intervals over documents\n"
        f"{report['date']}, {hardware}: {report['command']}",
    )
    out = path.with_suffix(".svg")
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return out


def main() -> None:
    """Parse the command line and draw one figure per report."""
    parser = argparse.ArgumentParser(
        prog="python -m dlm_ray.evaluation.picture", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("reports", type=Path, nargs="+", help="report.json of a quickstart")
    for path in parser.parse_args().reports:
        sys.stdout.write(f"{draw(path)}\n")


if __name__ == "__main__":
    main()
