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
    """Write report.json and report.html.

    Args:
        report: the content of report.json.
        run_dirs: run directories by name, for the learning curves.
        out: folder of both files.
    """
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    blocks: list[Block] = [
        *_summary(report),
        *_likelihoods(report),
        Figure(
            curves({name: _curve(run_dir) for name, run_dir in run_dirs.items()}, "step", "bits per byte, validation"),
            "Validation during training on fixed sequences and draws, with the averaged weights",
        ),
        _infilling(report["infill"]),
        *_samples(report["samples"]),
        Table(
            "Seconds by stage",
            ["stage", "seconds"],
            [[stage, f"{seconds:.1f}"] for stage, seconds in report["seconds"].items()],
        ),
    ]
    (out / "report.html").write_text(page("From autoregressive to diffusion", blocks))


def _summary(report: dict[str, Any]) -> list[Block]:
    difference = report["paired"]["adapted_minus_scratch"]
    paired = difference["ci95_documents_paired"]
    interval = f"95 % {paired[0]:+.3f} to {paired[1]:+.3f}" if paired else "no interval: one document"
    smoke = " A smoke test: a few steps, the numbers mean nothing." if report["smoke"] else ""
    return [
        Paragraph(
            f"A small autoregressive model ({report['base']}) was adapted to a masked diffusion model with annealed "
            "attention and shift, and the same network was trained from scratch on the same tokens. Text: source code "
            f"and documentation of Python {report['hardware']['python']}, {report['corpus']['bytes']:,} bytes. "
            f"{report['date']}, {report['hardware']['cores']} cores.{smoke}"
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
            f"Adapted minus scratch, paired over documents: {difference['bits_per_byte']:+.3f} bits per byte "
            f"({interval}).",
            "How well each model predicts held-out text",
        ),
    ]


def _likelihoods(report: dict[str, Any]) -> list[Block]:
    values = {name: (label, report[name]) for name, label in _LABELS.items()}
    rows = [
        (label, scored["bits_per_byte"], *(scored["ci95_documents"] or (None, None)))
        for label, scored in values.values()
    ]
    cells = [
        [
            label,
            f"{scored['bits_per_byte']:.3f}",
            _range(scored["ci95_documents"]) or "none: one document",
            _range(scored["ci95_draws"]),
        ]
        for label, scored in values.values()
    ]
    baselines = [
        ["unigram frequencies of tokens", f"{report['unigram_bits_per_byte']:.3f}", "", ""],
        ["xz -9", f"{report['xz_bits_per_byte']:.3f}", "", ""],
    ]
    return [
        Figure(
            intervals(rows, "bits per byte (lower is better)"),
            "Bits per byte on held-out documents with 95 % bootstrap intervals over documents",
        ),
        Table(
            "The same numbers, with simple baselines",
            ["model", "bits per byte", "95 % over documents", "95 % over draws"],
            [*cells, *baselines],
        ),
    ]


def _samples(samples: dict[str, Any]) -> list[Block]:
    return [
        Table(
            f"{samples['adapted']['num_samples']} unconditional samples",
            ["model", "share of 4-grams in held-out text", "distinct-2"],
            [[name, f"{one['held_out_4grams']:.3f}", f"{one['distinct_2']:.3f}"] for name, one in samples.items()],
        ),
        *(
            Code(f"Unconditional sample {number} of the adapted model", [(text, False)])
            for number, text in enumerate(samples["adapted"]["texts"], 1)
        ),
    ]


def _infilling(infill: dict[str, str]) -> Block:
    return Code(
        "Infilling: the model generated the marked text between the other two",
        [(infill["prefix"], False), (infill["written"], True), (infill["suffix"], False)],
    )


def _range(interval: list[float] | tuple[float, float] | None) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def _curve(run_dir: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation"]["bits_per_byte"]) for line in lines if "validation" in line]
