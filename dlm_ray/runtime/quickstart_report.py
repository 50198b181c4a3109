"""The quickstart's report.json and report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlm_ray.report import Block, Code, Figure, Numbers, Paragraph, Table, curves, intervals, page

INFILL_PREFIX = '''def read_lines(path):
    """Return the lines of a text file."""
'''
INFILL_SUFFIX = """
    return lines
"""

_LABELS = {
    "ar": "AR base (exact)",
    "adapted": "adapted to diffusion (bound)",
    "scratch": "diffusion from scratch (bound)",
    "unadapted": "AR base as a denoiser, untrained (bound)",
}


def write_report(report: dict[str, Any], run_dirs: dict[str, Path], out: Path) -> None:
    """Writes both files; `run_dirs` gives the learning curves."""
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    difference = report["paired"]["adapted_minus_scratch"]
    paired = difference["ci95_documents_paired"]
    interval = f"95 % {paired[0]:+.3f} to {paired[1]:+.3f}" if paired else "no interval: one document"
    blocks: list[Block] = [
        Paragraph(
            f"A small autoregressive model ({report['base']}) was adapted to a masked diffusion model with annealed attention and shift, beside the same "
            f"network from scratch on the same tokens. Text: source code and documentation of Python {report['hardware']['python']}, "
            f"{report['corpus']['bytes']:,} bytes. {report['date']}, {report['hardware']['cores']} cores."
            + (" A smoke test: a few steps, the numbers mean nothing." if report["smoke"] else "")
        ),
        Numbers(
            [
                (f"{report['adapted']['bits_per_byte']:.3f}", "bits per byte, adapted (bound)"),
                (f"{report['scratch']['bits_per_byte']:.3f}", "from scratch (bound)"),
                (f"{report['ar']['bits_per_byte']:.3f}", "AR base (exact)"),
                (f"{report['seconds']['in_all'] / 60:.1f} min", "in all"),
            ]
        ),
        Paragraph(
            f"Adapted less scratch, paired over documents: {difference['bits_per_byte']:+.3f} bits per byte ({interval}).",
            "How well each model knows held-out text",
        ),
        Figure(
            intervals(
                [
                    (label, report[name]["bits_per_byte"], *(report[name]["ci95_documents"] or (None, None)))
                    for name, label in _LABELS.items()
                ],
                "bits per byte (lower is better)",
            ),
            "Bits per byte on held-out documents with 95 % bootstrap intervals over documents",
        ),
        Table(
            "The same in numbers, and what anybody should beat",
            ["model", "bits per byte", "95 % over documents", "95 % over draws"],
            [
                *(
                    [
                        label,
                        f"{report[name]['bits_per_byte']:.3f}",
                        _range(report[name]["ci95_documents"]) or "none: one document",
                        _range(report[name]["ci95_draws"]),
                    ]
                    for name, label in _LABELS.items()
                ),
                ["unigram frequencies of tokens", f"{report['unigram_bits_per_byte']:.3f}", "", ""],
                ["xz -9", f"{report['xz_bits_per_byte']:.3f}", "", ""],
            ],
        ),
        Figure(
            curves({name: _curve(run_dir) for name, run_dir in run_dirs.items()}, "step", "bits per byte, validation"),
            "Validation in the loop on fixed rows and draws, with the averaged weights",
        ),
        _infilling(report["infill"]),
        Table(
            f"{report['samples']['adapted']['num_samples']} texts from nothing",
            ["model", "share of 4-grams in held-out text", "distinct-2"],
            [
                [name, f"{one['held_out_4grams']:.3f}", f"{one['distinct_2']:.3f}"]
                for name, one in report["samples"].items()
            ],
        ),
        *(
            Code(f"Text from nothing, adapted, number {number}", [(text, False)])
            for number, text in enumerate(report["samples"]["adapted"]["texts"], 1)
        ),
        Table(
            "Seconds by stage",
            ["stage", "seconds"],
            [[stage, f"{seconds:.1f}"] for stage, seconds in report["seconds"].items()],
        ),
    ]
    (out / "report.html").write_text(page("From autoregressive to diffusion", blocks))


def _infilling(infill: dict[str, str]) -> Code:
    return Code(
        "Infilling: the marked text was written between the other two",
        [(infill["prefix"], False), (infill["written"], True), (infill["suffix"], False)],
    )


def _range(interval: list[float] | tuple[float, float] | None) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def _curve(run_dir: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation"]["bits_per_byte"]) for line in lines if "validation" in line]
