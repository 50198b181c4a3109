"""Multiple choice by likelihood: the choice with the fewest nats given the prompt, exact (AR) or by bound (diffusion).

All models answer the same items. The draws of a diffusion model are shared by the choices of an item and by models, so
that choices and models compare in pairs.

    python -m dlm_ray.evaluation.tasks.multiple_choice base=MODEL adapted=RUN --items items --tasks piqa --out FILE.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dlm_ray.evaluation.studies import statistics
from dlm_ray.evaluation.studies.setup import hardware, print_progress
from dlm_ray.evaluation.tasks.items import Item, read_items

from dlm_ray.config.errors import UserError
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.generation.loading import load
from dlm_ray.generation.text_model import TextModel


@dataclass(frozen=True)
class Answers:
    """The nats of every choice of every item by one model."""

    nats: tuple[tuple[float, ...], ...]
    num_positions: int
    """Token positions that the network computed, padding included."""
    seconds: float

    def is_right(self, items: Sequence[Item], *, by_byte: bool) -> np.ndarray:
        """Return [items] bool: whether the choice with the fewest nats, or nats per byte, is the right one."""
        right = []
        for item, nats in zip(items, self.nats, strict=True):
            divisors = [len(choice.strip().encode()) if by_byte else 1 for choice in item.choices]
            right.append(int(np.argmin(np.array(nats) / divisors)) == item.label)
        return np.array(right)


def answer(
    model: TextModel,
    items: Sequence[Item],
    *,
    draws: int = 8,
    micro_batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Return the nats of the choices of every item, given its prompt.

    Sequences are scored in order of length, which keeps the padding small; a prompt that does not fit into the network
    is cut at its beginning.
    """
    started = time.monotonic()
    context = model.denoiser.network.config.max_position_embeddings
    rows: list[tuple[int, int, list[int], int]] = []  # item, choice, ids, tokens of the choice
    for number, item in enumerate(items):
        for index, choice in enumerate(item.choices):
            prompt, ids = model.encode(item.prompt), model.encode(item.prompt + choice)
            num_common = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            num_scored = len(ids) - num_common
            if num_scored >= context:
                raise UserError(f"a choice of item {number} has {num_scored} tokens; the network has {context}")
            kept = model.prompt_ids(ids)[-context:]
            rows.append((number, index, [model.prompt_ids([])[0], *kept[1:]], num_scored))
    rows.sort(key=lambda row: len(row[2]))
    nats: list[list[float]] = [[0.0] * len(item.choices) for item in items]
    passes = 1 if model.objective.likelihood == "exact" else draws
    num_positions = 0
    chunk = micro_batch_size * 4
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        length = max(len(ids) for _, _, ids, _ in part)
        x_0 = np.zeros((len(part), length), dtype=np.int64)
        document_ids = np.full(x_0.shape, -1, dtype=np.int32)
        is_given = np.zeros(x_0.shape, dtype=bool)
        for row, (_, _, ids, num_scored) in enumerate(part):
            x_0[row, : len(ids)], document_ids[row, : len(ids)] = ids, 0
            is_given[row, : len(ids) - num_scored] = True
        scored = likelihood.token_nats(
            model.denoiser,
            model.objective,
            x_0,
            document_ids,
            lambda ids: Visibility(model.pattern, document_ids=documents_apart(ids, False, model.device)),
            model.device,
            num_draws=passes,
            seed=seed,
            micro_batch_size=micro_batch_size,
            is_given=is_given,
            keys=[number for number, _, _, _ in part],
        )
        for (number, index, _, _), total in zip(part, scored.nats.sum(1), strict=True):
            nats[number][index] = float(total)
        halves = 2 if getattr(model.objective, "block_tokens", length) < length and passes > 1 else 1
        num_positions += x_0.size * passes * halves
        if progress is not None:
            progress(start + len(part), len(rows))
    return Answers(tuple(map(tuple, nats)), num_positions, time.monotonic() - started)


def compare(items: Sequence[Item], answers: dict[str, Answers], baseline: str) -> dict[str, Any]:
    """Return each model's accuracy with its 95 % interval, and its paired difference to the baseline.

    `acc` compares nats, `acc_norm` nats per byte of the choice.
    """
    table: dict[str, Any] = {}
    for name, given in answers.items():
        table[name] = {"seconds": round(given.seconds, 1), "positions": given.num_positions}
        for metric, by_byte in (("acc", False), ("acc_norm", True)):
            right = given.is_right(items, by_byte=by_byte).astype(float)
            of_baseline = answers[baseline].is_right(items, by_byte=by_byte).astype(float)
            table[name][metric] = float(right.mean())
            table[name][f"{metric}_ci95"] = statistics.bootstrap_interval(right.tolist())
            if name != baseline:
                difference = (right - of_baseline).tolist()
                table[name][f"{metric}_minus_{baseline}"] = float(np.mean(difference))
                table[name][f"{metric}_minus_{baseline}_ci95"] = statistics.bootstrap_interval(difference)
    return table


def main() -> None:
    """Answer the tasks from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dlm_ray.evaluation.tasks.multiple_choice", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL", help="the first is the baseline of the differences")
    parser.add_argument("--items", type=Path, required=True, help="folder with TASK.jsonl (see `tasks.items`)")
    parser.add_argument("--tasks", default="hellaswag,piqa,arc_easy", help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="items of each task, evenly spaced (default: all)")
    parser.add_argument("--draws", type=int, default=8, help="draws of (t, mask) of a diffusion model (default: 8)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; tasks and models that it has are kept")
    arguments = parser.parse_intermixed_args()
    models = dict(argument.split("=", 1) for argument in arguments.models)
    result: dict[str, Any] = {"tasks": {}}
    nats: dict[str, dict[str, Any]] = {}
    if arguments.out.exists():
        nats = json.loads(arguments.out.read_text())["nats"]
    for name, path in models.items():
        model: TextModel | None = None
        for task in arguments.tasks.split(","):
            key = f"{task}/{arguments.limit}/{arguments.draws}/{path}"
            if key in nats:
                continue
            model = model or load(path)
            items = read_items(arguments.items / f"{task}.jsonl", arguments.limit)
            given = answer(model, items, draws=arguments.draws)
            print_progress(f"{task}, {name}: {given.is_right(items, by_byte=True).mean():.3f} in {given.seconds:.0f} s")
            nats[key] = vars(given)
            _write(arguments.out, {"nats": nats})
    for task in arguments.tasks.split(","):
        items = read_items(arguments.items / f"{task}.jsonl", arguments.limit)
        answers = {
            name: Answers(**nats[f"{task}/{arguments.limit}/{arguments.draws}/{path}"]) for name, path in models.items()
        }
        result["tasks"][task] = {"items": len(items), "models": compare(items, answers, next(iter(models)))}
    result |= {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "draws": arguments.draws,
        "nats": nats,
    }
    _write(arguments.out, result)
    sys.stdout.write(json.dumps(result["tasks"], indent=2) + "\n")


def _write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file by the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
