"""Read text files, JSONL, parquet, and folders of them in chunks of a few megabytes and in a fixed order."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.paths import local_path

CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Piece:
    """A range of one file: bytes of a JSONL file (lines that begin there), parquet row groups, or the whole file."""

    path: str
    kind: str
    """One of text, jsonl, jsonl.gz and parquet."""
    first: int
    last: int
    size_bytes: int


@dataclass(frozen=True)
class SourceChunk:
    """Pieces of files, whose documents one task tokenizes and writes into its own shards."""

    number: int
    pieces: tuple[Piece, ...]

    def as_dict(self) -> dict[str, object]:
        """Return the chunk as a build's marker holds it, so that an interrupted build recognizes its work."""
        return {"number": self.number, "pieces": [asdict(piece) for piece in self.pieces]}


def list_chunks(inputs: Sequence[str]) -> list[SourceChunk]:
    """Divide files, folders (walked in sorted order) and globs into chunks.

    Raises:
        UserError: if an input does not exist.
    """
    chunks: list[SourceChunk] = []
    pieces: list[Piece] = []
    num_bytes = 0
    for path in _files(inputs):
        for piece in _pieces(path):
            if pieces and num_bytes + piece.size_bytes > CHUNK_BYTES:
                chunks.append(SourceChunk(len(chunks), tuple(pieces)))
                pieces, num_bytes = [], 0
            pieces.append(piece)
            num_bytes += piece.size_bytes
    if pieces:
        chunks.append(SourceChunk(len(chunks), tuple(pieces)))
    return chunks


def documents(chunk: SourceChunk, text_field: str) -> Iterator[str]:
    """Yield the documents of a chunk: a whole text file, a line of a JSONL file, or a row of a parquet file.

    Raises:
        UserError: if a line or row has no such field, or text is not UTF-8.
        DamageError: if a line is not JSON.
    """
    for _, text in located_documents(chunk, text_field):
        yield text


def located_documents(chunk: SourceChunk, text_field: str) -> Iterator[tuple[str, str]]:
    """Yield (place, document) of a chunk; the place is the file, and the position in it."""
    for piece in chunk.pieces:
        if piece.kind == "text":
            yield piece.path, _text(piece.path)
        elif piece.kind == "parquet":
            yield from _parquet(piece, text_field)
        else:
            yield from _json_lines(piece, text_field)


def _files(inputs: Sequence[str]) -> Iterator[Path]:
    """Yield the files as absolute paths, because the reader of a chunk may run in another folder."""
    for pattern in inputs:
        path = local_path(pattern, "SOURCE", "files or folders on a local disk").absolute()
        if path.is_dir():
            yield from sorted(
                file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))
            )
        elif path.is_file():
            yield path
        else:
            matches = sorted(glob.glob(pattern, recursive=True))
            if not matches:
                raise UserError(
                    f"{pattern!r} is not a file, a folder, or a pattern that matches one; give text files, .jsonl, "
                    ".parquet or folders"
                )
            yield from (Path(match).absolute() for match in matches if Path(match).is_file())


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _pieces(path: Path) -> Iterator[Piece]:
    size = path.stat().st_size
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        metadata = parquet.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            yield Piece(str(path), "parquet", group, group + 1, metadata.row_group(group).total_byte_size)
    elif path.suffix == ".jsonl":
        for first in range(0, size, CHUNK_BYTES):
            last = min(size, first + CHUNK_BYTES)
            yield Piece(str(path), "jsonl", first, last, last - first)
    elif path.name.endswith(".jsonl.gz"):
        yield Piece(str(path), "jsonl.gz", 0, size, size)
    else:
        yield Piece(str(path), "text", 0, size, size)


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or remove it from the sources"
        ) from error


def _json_lines(piece: Piece, text_field: str) -> Iterator[tuple[str, str]]:
    stream = gzip.open(piece.path, "rb") if piece.kind == "jsonl.gz" else open(piece.path, "rb")
    with stream:
        if piece.first > 0:
            stream.seek(piece.first - 1)
            stream.readline()  # the line that continues into this piece belongs to the previous one
        while piece.kind == "jsonl.gz" or stream.tell() < piece.last:
            offset = stream.tell()
            line = stream.readline()
            if not line:
                return
            if line.strip():
                where = f"{piece.path}, byte {offset}"
                yield where, _field(line, text_field, where)


def _field(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DamageError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no text in field {text_field!r} (it has: {known}); name the field with `text_field`")
    text: str = record[text_field]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: an unpaired surrogate at character {error.start} has no UTF-8 form; repair or remove the line"
        ) from error
    return text


def _parquet(piece: Piece, text_field: str) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(piece.path)
    if text_field not in file.schema_arrow.names:
        raise UserError(
            f"{piece.path} has no column {text_field!r} (it has: {', '.join(file.schema_arrow.names)}); name the "
            "column with `text_field`"
        )
    for group in range(piece.first, piece.last):
        for row, text in enumerate(file.read_row_group(group, columns=[text_field])[text_field].to_pylist()):
            if text:
                yield f"{piece.path}, row {row} of row group {group}", text
