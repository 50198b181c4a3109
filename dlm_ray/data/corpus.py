"""Real text that every machine has: the source code and the documentation topics of the Python that runs this."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from dlm_ray.config.errors import UserError
from dlm_ray.data import storage

_LEAST_BYTES = 2 * 2**20
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


def write_corpus(path: str, max_bytes: int | None = None) -> dict[str, Any]:
    """Writes a JSONL file of {"path", "text"} records, a module or a topic each.

    Args:
        path: of the file.
        max_bytes: leaves out what comes after so many bytes; all of it if None.

    Returns:
        documents, bytes, and the sha256 of the file: two Pythons with the same fingerprint have the same corpus.

    Raises:
        UserError: if this Python came without its sources.
    """
    lines = [json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n" for name, text in _documents()]
    ends = list(accumulate(len(line.encode()) for line in lines))
    if not ends or ends[-1] < _LEAST_BYTES:
        raise UserError(
            f"this Python has only {ends[-1] if ends else 0:,} bytes of sources in {sysconfig.get_paths()['stdlib']} (a stripped or zipped installation?), "
            f"and the quickstart's corpus needs {_LEAST_BYTES:,}; use a Python with its standard library's .py files, or your own text with "
            "`dlm-ray data build`"
        )
    content = "".join(lines if max_bytes is None else lines[: bisect_right(ends, max_bytes)]).encode()
    storage.write(path, content)
    return {"documents": content.count(b"\n"), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _documents() -> Iterator[tuple[str, str]]:
    """Modules in sorted order, then topics; files that are not UTF-8 are left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if _LEFT_OUT.isdisjoint(name.parts):
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
