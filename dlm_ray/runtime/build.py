"""Builds a data folder: parts of the sources in parallel through Ray Data, the index last."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dlm_ray.runtime import cluster  # first of all: it sets what Ray reads when it is imported

# isort: split
import ray
import ray.data

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.paths import check_url
from dlm_ray.data import index as indexes
from dlm_ray.data import sources, storage
from dlm_ray.data.build import Settings, build_part, write_index
from dlm_ray.data.tokenizer import identity, load_tokenizer, train_tokenizer

# A byte-pair encoding of a few thousand pieces does not change with more text than this.
_TOKENIZER_BYTES = 64 * 2**20


def build(
    inputs: Sequence[str],
    out: str,
    *,
    tokenizer: str | None = None,
    train_tokenizer_vocab: int | None = None,
    sequence_length: int,
    held_out: float = 0.01,
    text_field: str = "text",
    sequences_per_shard: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> indexes.Index:
    """Text -> tokens -> packed rows -> shards in `out`, with an index that is written last.

    The same inputs give the same bytes. A build that was interrupted goes on where it stopped: parts whose inputs and settings
    are the same are kept.

    Args:
        inputs: text files, .jsonl, .jsonl.gz, .parquet, folders or patterns.
        out: a local folder, s3:// or gs://.
        tokenizer: a folder, a hub name or a GGUF file; or else
        train_tokenizer_vocab: trains a byte-level BPE of so many tokens on the inputs.
        sequence_length: L.
        held_out: share of the documents, by hash, that goes to the split `held_out`.
        text_field: of JSONL records and parquet columns.
        sequences_per_shard: at most.
        progress: called with (parts done, parts).

    Raises:
        UserError: if there is no text, or `out` holds data of other settings.
    """
    if (tokenizer is None) == (train_tokenizer_vocab is None):
        raise UserError("give one of --tokenizer NAME and --train-tokenizer VOCAB")
    if sequence_length < 3:
        raise UserError(
            f"--sequence-length {sequence_length} is too short for a start token and text; 3 is the least, 256 and more is usual"
        )
    if not 0 <= held_out < 1:
        raise UserError(f"--held-out {held_out} is a share of the documents: at least 0 and below 1")
    check_url(out, "--out")
    parts = sources.list_parts(inputs)
    out = out if storage.is_remote(out) else str(Path(out).absolute())
    with tempfile.TemporaryDirectory() as folder:
        chosen = (
            load_tokenizer(tokenizer)
            if tokenizer is not None
            else _trained(parts, text_field, train_tokenizer_vocab or 0)
        )
        chosen.save_pretrained(folder)
        own = replace(identity(load_tokenizer(folder)), name=Path(tokenizer or "trained").name)
        settings = Settings(own.sha256, sequence_length, held_out, text_field, sequences_per_shard)
        built_from = {"settings": asdict(settings), "inputs": [Path(one).name for one in inputs], "parts": len(parts)}
        _refuse_other_settings(out, built_from)
        for path in sorted(
            path for path in Path(folder).rglob("*") if path.is_file()
        ):  # other chat templates lie in a folder
            storage.write(storage.join(out, f"tokenizer/{path.relative_to(folder)}"), path.read_bytes())
        results: dict[int, dict[str, Any]] = {}
        for number, result in _run(parts, storage.join(out, "tokenizer"), settings, out):
            results[number] = result
            if progress is not None:
                progress(len(results), len(parts))
    if not any(split["rows"] for result in results.values() for split in result.values()):
        raise UserError(f"no text in {', '.join(inputs)}: nothing to build; check the paths and --text-field")
    return write_index(out, [results[part.number] for part in parts], sequence_length, own, built_from)


def _run(
    parts: Sequence[sources.SourceChunk], tokenizer_folder: str, settings: Settings, out: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, result) of every part as it is finished, from tasks of Ray Data."""
    if not parts:
        return
    with cluster.session():
        # What a task raises that a person should read comes back as it is: Ray would wrap it beyond recognition.
        def task(item: dict[str, Any]) -> dict[str, Any]:
            part = parts[item["id"]]
            try:
                return {
                    "part": part.number,
                    "result": json.dumps(build_part(part, tokenizer_folder, settings, out)),
                    "error": "",
                    "kind": "",
                }
            except UserError as error:
                return {"part": part.number, "result": "", "error": str(error), "kind": type(error).__name__}

        for row in ray.data.range(len(parts), override_num_blocks=len(parts)).map(task).iter_rows():
            if row["kind"]:
                raise (DamageError if row["kind"] == "DamageError" else UserError)(row["error"])
            yield row["part"], json.loads(row["result"])


def _trained(parts: Sequence[sources.SourceChunk], text_field: str, vocab_size: int) -> Any:
    """A tokenizer trained on documents spread evenly over the parts."""

    def sample() -> Iterator[str]:
        per_part = _TOKENIZER_BYTES // max(1, len(parts))
        for part in parts:
            taken = 0
            for text in sources.documents(part, text_field):
                if taken >= per_part:
                    break
                taken += len(text)
                yield text

    return train_tokenizer(sample(), vocab_size)


def _refuse_other_settings(out: str, built_from: dict[str, Any]) -> None:
    name = storage.join(out, indexes.NAME)
    if not storage.exists(name):
        return
    before = json.loads(storage.read(name))["built_from"]
    changed = [
        f"{key} was {before['settings'].get(key)}, asked {value}"
        for key, value in built_from["settings"].items()
        if before["settings"].get(key) != value
    ]
    changed += (
        [f"inputs were {before['inputs']}, asked {built_from['inputs']}"]
        if before["inputs"] != built_from["inputs"]
        else []
    )
    if changed:
        raise UserError(
            f"{out} holds data that was built otherwise ({'; '.join(changed)}); choose another --out, or remove that folder"
        )
