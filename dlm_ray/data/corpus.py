"""Real text on every machine: the source code of the running Python, or the prose of its documentation."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TypedDict

from dlm_ray.config.errors import UserError
from dlm_ray.data import storage

_MIN_BYTES = 2 * 2**20
_MIN_PROSE_BYTES = 2**19
_MIN_WORDS, _MIN_SHARE_OF_WORDS = 12, 0.8
"""A paragraph is prose if it has this many words, and this share of them has letters only, apart from punctuation."""
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
    return _write(path, _documents(), max_bytes, _MIN_BYTES)


def write_prose(path: str, max_bytes: int | None = None) -> CorpusFields:
    """Write a JSONL file of English prose: the paragraphs of Python's documentation topics and docstrings.

    A record is a topic, or the docstrings of a module. Code, tables, signatures and lists of names are left out, lines
    are joined to paragraphs, and a paragraph that occurs twice is kept once, so that no two documents share one.

    Args:
        path, max_bytes: as in `write_corpus`.

    Returns:
        As `write_corpus`.

    Raises:
        UserError: as `write_corpus`.
    """
    return _write(path, _prose_documents(), max_bytes, _MIN_PROSE_BYTES)


def _write(path: str, documents: Iterable[tuple[str, str]], max_bytes: int | None, min_bytes: int) -> CorpusFields:
    """Write records of (name, text) and describe the file."""
    lines = [json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n" for name, text in documents]
    ends = list(accumulate(len(line.encode()) for line in lines))
    if not ends or ends[-1] < min_bytes:
        raise UserError(
            f"this Python has only {ends[-1] if ends else 0:,} bytes of text in {sysconfig.get_paths()['stdlib']} "
            f"(a stripped or zipped installation?), and the quickstart's corpus needs {min_bytes:,}; use a Python "
            "with its standard library's .py files, or your own text with `dlm-ray data build`"
        )
    content = "".join(lines if max_bytes is None else lines[: bisect_right(ends, max_bytes)]).encode()
    storage.write(path, content)
    return {"documents": content.count(b"\n"), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the modules in sorted order, then of the topics."""
    yield from _modules()
    for topic, text in _topics().items():
        yield f"topic {topic}", text


def _prose_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, paragraphs) of the topics, then of the docstrings of each module, where there is prose."""
    seen: set[str] = set()
    texts = [(f"topic {topic}", [text]) for topic, text in _topics().items()]
    texts += [(name, _docstrings(source)) for name, source in _modules()]
    for name, parts in texts:
        paragraphs = [paragraph for part in parts for paragraph in _prose(part) if paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            yield name, "\n\n".join(dict.fromkeys(paragraphs))


def _modules() -> Iterator[tuple[str, str]]:
    """Yield (path, source) of the standard library's modules in sorted order; skip files that are not UTF-8."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if _EXCLUDED.isdisjoint(name.parts):
            try:
                yield str(name), file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _topics() -> dict[str, str]:
    """Return the documentation topics of `help()` in sorted order; none if they are not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {topic: topics[topic] for topic in sorted(topics)}


def _docstrings(source: str) -> list[str]:
    """Return the docstrings of a module and of all that it defines, in order of their lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in old modules
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for text in map(ast.get_docstring, nodes) if text]


def _prose(text: str) -> list[str]:
    """Return the paragraphs of English prose in a text, each on one line."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    if len(words) < _MIN_WORDS or ">>>" in paragraph or not paragraph[0].isupper():
        return False
    num_plain = sum(word.strip(".,;:!?()[]\"'*-").replace("-", "").isalpha() for word in words)
    return num_plain >= _MIN_SHARE_OF_WORDS * len(words)
