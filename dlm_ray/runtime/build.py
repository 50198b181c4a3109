"""Build a data folder: chunks of the sources in parallel through Ray Data, the index last."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dlm_ray.runtime import cluster  # imported first: it sets the variables that Ray reads when it is imported

# isort: split
import ray
import ray.data

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.paths import check_url
from dlm_ray.config.trees import differences
from dlm_ray.data import index as indexes
from dlm_ray.data import sources, storage
from dlm_ray.data.build import ChunkResult, Settings, build_chunk, write_index
from dlm_ray.data.tokenizer import FastTokenizer, identity, load_tokenizer, train_tokenizer

# A byte-pair encoding of a few thousand pieces does not change with more text than this.
_TOKENIZER_BYTES = 64 * 2**20
_MIN_SEQUENCE_LENGTH = 3


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
    """Tokenize text, pack it into sequences and write shards into `out`, with the index last.

    The same inputs give the same bytes. An interrupted build resumes: chunks with the same input and settings are kept.

    Args:
        inputs: text files, .jsonl, .jsonl.gz, .parquet, folders or glob patterns.
        out: a local folder, s3:// or gs://.
        tokenizer: a Hugging Face folder, a hub name or a GGUF file. Give this or `train_tokenizer_vocab`.
        train_tokenizer_vocab: train a byte-level BPE of this many tokens on the inputs.
        sequence_length: L, tokens per packed sequence.
        held_out: share of the documents, chosen by hash, in the split `held_out`.
        text_field: field of JSONL records and column of parquet files.
        sequences_per_shard: most sequences per shard.
        progress: called with (chunks done, chunks).

    Returns:
        The index. If the split `held_out` is empty, a warning says so.

    Raises:
        UserError: if an argument is invalid, there is no text, or `out` has data of other settings.
    """
    if (tokenizer is None) == (train_tokenizer_vocab is None):
        raise UserError("give exactly one of `tokenizer` and `train_tokenizer_vocab`")
    _check_ranges(sequence_length, held_out)
    check_url(out, "out")
    chunks = sources.list_chunks(inputs)
    out = out if storage.is_remote(out) else str(Path(out).absolute())
    with tempfile.TemporaryDirectory() as folder:
        used = load_tokenizer(tokenizer) if tokenizer is not None else None
        (used or _trained(chunks, text_field, train_tokenizer_vocab or 0)).save_pretrained(folder)
        tokenizer_identity = replace(identity(load_tokenizer(folder)), name=Path(tokenizer or "trained").name)
        settings = Settings(tokenizer_identity.sha256, sequence_length, held_out, text_field, sequences_per_shard)
        built_from = {
            "settings": asdict(settings),
            "inputs": [Path(name).name for name in inputs],
            "parts": len(chunks),
        }
        _refuse_other_settings(out, built_from)
        _store_tokenizer(Path(folder), out)
        results = _build_chunks(chunks, storage.join(out, "tokenizer"), settings, out, progress)
    if not any(split["sequences"] for result in results for split in result.values()):
        raise UserError(f"no text in {', '.join(inputs)}: nothing to build; check the paths and `text_field`")
    index = write_index(out, results, sequence_length, tokenizer_identity, built_from)
    _warn_of_empty_splits(index, held_out)
    return index


def _check_ranges(sequence_length: int, held_out: float) -> None:
    """Raise UserError if a number is outside its range."""
    if sequence_length < _MIN_SEQUENCE_LENGTH:
        allowed = f"too short for a start token and text; the minimum is {_MIN_SEQUENCE_LENGTH}, 256 and more is usual"
        raise UserError.of("sequence_length", sequence_length, allowed)
    if not 0 <= held_out < 1:
        raise UserError.of("held_out", held_out, "a share of the documents must be at least 0 and below 1")


def _store_tokenizer(folder: Path, out: str) -> None:
    """Copy the tokenizer's files, with those of subfolders (further chat templates), into the data folder."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        storage.write(storage.join(out, f"tokenizer/{path.relative_to(folder)}"), path.read_bytes())


def _warn_of_empty_splits(index: indexes.Index, held_out: float) -> None:
    for name in ("train", "held_out") if held_out else ("train",):
        if index.splits[name].sequences:
            continue
        total = sum(split.documents for split in index.splits.values())
        effect = "training cannot validate" if name == "held_out" else "there is nothing to train on"
        warnings.warn(
            f"the {name} split is empty, so {effect}: {total} documents were split by hash with held_out={held_out:g}; "
            f"give more documents (a text file is one document), or {'raise' if name == 'held_out' else 'lower'} "
            "`held_out`",
            stacklevel=3,
        )


def _build_chunks(
    chunks: Sequence[sources.SourceChunk],
    tokenizer_folder: str,
    settings: Settings,
    out: str,
    progress: Callable[[int, int], None] | None,
) -> list[ChunkResult]:
    """Build all chunks, and return their results in order; `progress` is called after each with (done, all)."""
    results: dict[int, ChunkResult] = {}
    for number, result in _run(chunks, tokenizer_folder, settings, out):
        results[number] = result
        if progress is not None:
            progress(len(results), len(chunks))
    return [results[chunk.number] for chunk in chunks]


def _run(
    chunks: Sequence[sources.SourceChunk], tokenizer_folder: str, settings: Settings, out: str
) -> Iterator[tuple[int, ChunkResult]]:
    """Yield (number, result) of every chunk as it is finished, from tasks of Ray Data."""
    if not chunks:
        return
    with cluster.session():
        # User errors are returned as values, because Ray would wrap an exception beyond recognition.
        def task(item: dict[str, int]) -> dict[str, int | str]:
            chunk = chunks[item["id"]]
            try:
                result = json.dumps(build_chunk(chunk, tokenizer_folder, settings, out))
            except UserError as error:
                return {"number": chunk.number, "result": "", "error": str(error), "kind": type(error).__name__}
            return {"number": chunk.number, "result": result, "error": "", "kind": ""}

        for item in ray.data.range(len(chunks), override_num_blocks=len(chunks)).map(task).iter_rows():
            if item["kind"]:
                raise (DamageError if item["kind"] == "DamageError" else UserError)(item["error"])
            yield item["number"], json.loads(item["result"])


def _trained(chunks: Sequence[sources.SourceChunk], text_field: str, vocab_size: int) -> FastTokenizer:
    """Return a tokenizer that is trained on documents spread evenly over the chunks."""

    def sample() -> Iterator[str]:
        per_chunk = _TOKENIZER_BYTES // max(1, len(chunks))
        for chunk in chunks:
            taken = 0
            for text in sources.documents(chunk, text_field):
                if taken >= per_chunk:
                    break
                taken += len(text)
                yield text

    return train_tokenizer(sample(), vocab_size)


def _refuse_other_settings(out: str, built_from: Mapping[str, object]) -> None:
    """Raise UserError if `out` has an index that was built from other inputs or settings."""
    name = storage.join(out, indexes.NAME)
    if not storage.exists(name):
        return
    before = json.loads(storage.read(name))["built_from"]
    changes = [
        f"{key.removeprefix('settings.')} was {old}, now {new}"
        for section in ("settings", "inputs")
        for key, old, new in differences(before[section], built_from[section], section)
    ]
    if changes:
        raise UserError(
            f"{out} has data of another build ({'; '.join(changes)}); choose another `out`, or remove that folder"
        )
