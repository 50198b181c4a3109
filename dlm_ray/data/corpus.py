"""A corpus of real text on every machine: the source code and the documentation topics of the running Python."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TypedDict

from dlm_ray.config.errors import UserError
from dlm_ray.data import storage

_MIN_BYTES = 2 * 2**20
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


class CorpusFields(TypedDict):
    """The size of a corpus, and its identity."""

    documents: int
    bytes: int
    sha256: str
    """Hash of the file, which is equal for Pythons with equal corpora."""


def write_corpus(path: str, max_bytes: int | None = None) -> CorpusFields:
    """Write a JSONL file of {"path", "text"} records, one per module or documentation topic.

    Args:
        path: the file to write.
        max_bytes: the largest size of the file; later records are left out. None writes all of them.

    Returns:
        The counts and the hash of the file.

    Raises:
        UserError: if this Python is installed without its sources.
    """
    lines = [json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n" for name, text in _documents()]
    ends = list(accumulate(len(line.encode()) for line in lines))
    if not ends or ends[-1] < _MIN_BYTES:
        raise UserError(
            f"this Python has only {ends[-1] if ends else 0:,} bytes of sources in {sysconfig.get_paths()['stdlib']} "
            f"(a stripped or zipped installation?), and the quickstart's corpus needs {_MIN_BYTES:,}; use a Python "
            "with its standard library's .py files, or your own text with `dlm-ray data build`"
        )
    content = "".join(lines if max_bytes is None else lines[: bisect_right(ends, max_bytes)]).encode()
    storage.write(path, content)
    return {"documents": content.count(b"\n"), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the modules in sorted order, then of the topics; skip files that are not UTF-8."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if _EXCLUDED.isdisjoint(name.parts):
            try:
                yield str(name), file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic in sorted(topics):
        yield f"topic {topic}", topics[topic]
