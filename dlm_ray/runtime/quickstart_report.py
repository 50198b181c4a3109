"""The quickstart's report.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm_ray.report import (
    Answers,
    Block,
    Code,
    Denoising,
    Figure,
    Numbers,
    Paragraph,
    Table,
    curves,
    intervals,
    page,
)

MODELS = {
    "base": "base (exact)",
    "continued": "base, continued (exact)",
    "adapted": "diffusion (bound)",
}
DIFFERENCES = {
    "adapted_minus_continued": "diffusion less base, continued",
    "adapted_minus_base": "diffusion less base",
    "continued_minus_base": "base, continued, less base",
}
Points = list[tuple[float, float]]


def write_report(report: dict[str, Any], run_dirs: Mapping[str, Path], out: Path) -> None:
    """Write report.json and report.html.

    Args:
        report: the content of report.json.
        run_dirs: run directories by name, for the learning curves.
        out: folder of both files.
    """
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    events = {name: _events(run_dir) for name, run_dir in run_dirs.items()}
    blocks: list[Block] = [
        *_summary(report),
        *_likelihoods(report),
        *_learning(report, events),
        *_texts(report),
        *_throughput(report),
        *_files(report, out),
    ]
    (out / "report.html").write_text(page("From autoregressive to diffusion", blocks))


def _summary(report: dict[str, Any]) -> list[Block]:
    base, text, hardware, scores = report["base"], report["text"], report["hardware"], report["scores"]
    smoke = " This is a smoke test with a few steps: its numbers mean nothing." if report["smoke"] else ""
    adapted, continued = scores["adapted"]["bits_per_byte"], scores["continued"]["bits_per_byte"]
    speed = _mean([answer["adapted"]["tokens_per_forward"] for answer in report["answers"]])
    return [
        Paragraph(
            f"The autoregressive model {base['name']} ({_count(base['parameters'])} parameters) was adapted to "
            f"{_kind(report['recipe'])} on {_count(report['training']['tokens'])} tokens. The control is the same "
            "base, trained further as an autoregressive model on the same tokens in the same number of steps. Text: "
            f"{text['kind']} of Python {hardware['python']}, {text['documents']:,} documents, {text['bytes']:,} bytes; "
            f"whole documents are held out. {report['date']}, {hardware['cores']} CPU cores, "
            f"{report['seconds']['in_all'] / 60:.1f} minutes.{smoke}"
        ),
        Numbers(
            [
                (f"{adapted:.3f}", "bits per byte, diffusion model (bound)"),
                (f"{continued:.3f}", "bits per byte, base continued (exact)"),
                (f"{scores['base']['bits_per_byte']:.3f}", "bits per byte, base (exact)"),
                (f"{speed:.2f}", "tokens per network call, diffusion model"),
            ]
        ),
    ]


def _likelihoods(report: dict[str, Any]) -> list[Block]:
    scores = report["scores"]
    rows = [_row(label, scores[name], "ci95_documents") for name, label in MODELS.items()]
    differences = [_row(label, report["paired"][name], "ci95_documents_paired") for name, label in DIFFERENCES.items()]
    cells = [
        [label, f"{value:.3f}", _range(low, high), _range(*(scores[name]["ci95_draws"] or (None, None)))]
        for name, (label, value, low, high) in zip(MODELS, rows, strict=True)
    ]
    cells += [[label, f"{value:+.3f}", _range(low, high), ""] for label, value, low, high in differences]
    baselines = report["baselines"]
    cells += [
        ["frequencies of single tokens", f"{baselines['unigram_bits_per_byte']:.3f}", "", ""],
        ["xz -9", f"{baselines['xz_bits_per_byte']:.3f}", "", ""],
    ]
    first = scores["adapted"]
    return [
        Paragraph(
            f"Bits per byte of {first['documents']} held-out documents ({first['bytes']:,} bytes); lower is better. "
            "A diffusion model gives an upper bound of its bits, an autoregressive model the exact number.",
            "How well each model predicts text",
        ),
        _figure(intervals, rows, "bits per byte (lower is better)", caption="95 % bootstrap intervals over documents"),
        _figure(
            intervals,
            differences,
            "difference in bits per byte",
            caption="Differences on the same documents, with paired 95 % intervals",
            zero=True,
        ),
        Table("The same numbers", ["model", "bits per byte", "95 % over documents", "95 % over draws"], cells),
    ]


def _learning(report: dict[str, Any], events: Mapping[str, list[dict[str, Any]]]) -> list[Block]:
    per_step = report["training"]["tokens_per_step"] / 1000
    at_start = report["base_bits_per_byte_of_validation"]
    lines = {
        "base, continued": [(0.0, at_start), *_validations(events["continued"], per_step)],
        "diffusion": _validations(events["adapted"], per_step),
    }
    spans = _spans(report["training"])
    caption = "Held-out text during training, on fixed sequences and draws; the base's own number is at 0"
    if spans:
        caption += ". Shaded: the block size K that training has reached; validation has the last one throughout"
    labels = ("thousand tokens of training", "bits per byte, validation")
    blocks: list[Block] = [
        Paragraph("", "What training changed"),
        _figure(curves, lines, *labels, caption=caption, spans=spans),
    ]
    by_t = [(event["step"], event["validation"]["nll_by_t"]) for event in events["adapted"] if "validation" in event]
    if len(by_t) > 1:
        series = {
            f"step {step}": [((number + 0.5) / len(values), value) for number, value in enumerate(values)]
            for step, values in (by_t[0], by_t[-1])
        }
        caption = "Cross-entropy of masked tokens by the masked share t, at the first and the last validation"
        blocks.append(_figure(curves, series, "masked share t", "nats per masked token", caption=caption))
    return blocks


def _texts(report: dict[str, Any]) -> list[Block]:
    denoising, infill, samples = report["denoising"], report["infill"], report["samples"]
    blocks: list[Block] = [
        Paragraph(
            "All decode greedily. The base writes one token per network call. The diffusion model accepts in each "
            "call every token of a block that it is sure of. Calls for the prompt count.",
            "What the models answer",
        ),
        *(
            Answers(
                answer["prompt"],
                [("base", answer["base"]["text"], _cost(answer["base"])),
                 ("diffusion", answer["adapted"]["text"], _cost(answer["adapted"]))],
            )
            for answer in report["answers"]
        ),
        Paragraph("", "A text as it is denoised"),
        Denoising(
            "Move the slider through the steps. Grey: masked. Marked: known since this step.",
            denoising["prompt"],
            denoising["tokens"],
            denoising["steps"],
        ),
    ]  # fmt: skip
    if infill is not None:
        beside = ""
        if "base" in infill:
            beside = f" The base, which sees only the text before, continues with {infill['base']!r}."
        blocks += [
            Paragraph(f"The model wrote the marked text between the other two.{beside}", "Infilling"),
            Code("", [(infill["prefix"], False), (infill["written"], True), (infill["suffix"], False)]),
        ]
    if samples is not None:
        caption = (
            f"One of {samples['num_samples']} samples without a prompt; {samples['held_out_4grams']:.1%} of their "
            f"4-grams occur in the held-out text, distinct-2 is {samples['distinct_2']:.2f}"
        )
        blocks.append(Code(caption, [(samples["texts"][0], False)]))
    return blocks


def _throughput(report: dict[str, Any]) -> list[Block]:
    by_run = report["training"]["by_run"]
    names = {"base": "base, from scratch", "continued": "base, continued", "adapted": "diffusion"}
    training = [
        [names[name], str(run["steps"]), f"{run['tokens_per_second']:,.0f}", f"{run['loss']:.3f}"]
        for name, run in by_run.items()
    ]
    writers = {"base": "base", "transformers": "base in stock transformers, greedy with cache", "adapted": "diffusion"}
    sampling = [[label, *_totals([answer[name] for answer in report["answers"]])] for name, label in writers.items()]
    return [
        Paragraph("", "How fast"),
        Table("Training, two workers", ["run", "steps", "tokens/s", "last loss"], training),
        Table("The answers above, one at a time", ["model", "tokens", "tokens per call", "tokens/s"], sampling),
        Table(
            "Seconds by stage",
            ["stage", "seconds"],
            [[stage, f"{seconds:.1f}"] for stage, seconds in report["seconds"].items()],
        ),
    ]


def _files(report: dict[str, Any], out: Path) -> list[Block]:
    files = [["the numbers of this page", str(out / "report.json")], ["text and data", str(out / "data")]]
    files += [[f"run: {name}", path] for name, path in report["files"].items()]
    files += [["the diffusion model for transformers", report["export"]]]
    return [
        Paragraph("", "What to do next"),
        Code(
            "Talk to the model, serve it, or adapt a base on text of your own", [("\n".join(report["commands"]), False)]
        ),
        Table("Files", ["what", "where"], files),
    ]


def _figure(draw: Callable[..., Any], *arguments: Any, caption: str, **options: Any) -> Figure:
    """Return a figure with a variant for phones."""
    return Figure(draw(*arguments, **options), caption, draw(*arguments, **options, narrow=True))


def _row(label: str, score: Mapping[str, Any], interval: str) -> tuple[str, float, float | None, float | None]:
    low, high = score[interval] or (None, None)
    return label, score["bits_per_byte"], low, high


def _range(low: float | None, high: float | None) -> str:
    return f"{low:.3f} to {high:.3f}" if low is not None else ""


def _events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _validations(events: Sequence[dict[str, Any]], tokens_per_step: float) -> Points:
    return [
        (event["step"] * tokens_per_step, event["validation"]["bits_per_byte"])
        for event in events
        if "validation" in event
    ]


def _spans(training: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    """Return the parts of training by block size, in thousands of tokens; none if the size was the same throughout."""
    stages, per_step = training["block_sizes"], training["tokens_per_step"] / 1000
    if len(stages) < 2:
        return []
    return [
        (stage["from_step"] * per_step, stage["to_step"] * per_step, f"K = {stage['block_tokens']}") for stage in stages
    ]


def _kind(recipe: Mapping[str, Any]) -> str:
    size = recipe.get("objective", {}).get("block_tokens")
    return f"block diffusion with blocks of {size} tokens" if size else "masked diffusion of whole sequences"


def _cost(answer: Mapping[str, Any]) -> str:
    return (
        f"{answer['tokens']} tokens in {answer['forwards']} calls, {answer['tokens_per_forward']:.2f} tokens per call, "
        f"{answer['tokens_per_second']:.1f} tokens/s"
    )


def _totals(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    tokens, calls, seconds = (sum(answer[key] for answer in answers) for key in ("tokens", "forwards", "seconds"))
    return [str(tokens), f"{tokens / calls:.2f}", f"{tokens / seconds:.1f}"]


def _count(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
