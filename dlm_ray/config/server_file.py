"""A server from a YAML file or a checkpoint and `key=value`, and its API keys: every mistake at once, no key in any message."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dlm_ray.config.errors import UserError
from dlm_ray.config.load import _parse, all_keys, listed, set_key
from dlm_ray.config.paths import local_path
from dlm_ray.config.server import Server

KEYS_VARIABLE = "DLM_RAY_API_KEYS"
_LEAST_KEY_CHARACTERS = 16


def load_server(target: str, overrides: Sequence[str] = ()) -> Server:
    """The server of a YAML file, or of a checkpoint with the defaults.

    Args:
        target: a file that ends in .yaml or .yml, else a checkpoint.
        overrides: `engine.slots=8`; values are YAML.

    Raises:
        UserError: with every mistake that was found.
    """
    if target.endswith((".yaml", ".yml")):
        file = local_path(target, "the server's file", "a local file")
        if not file.is_file():
            raise UserError(f"there is no file {target!r}")
        tree = _parse(file.read_text(), target, "server")
    else:
        tree = {"checkpoint": target}
    problems = [problem for override in overrides for problem in set_key(tree, override)]
    if problems:
        raise UserError(listed(target, problems))
    try:
        server = Server.model_validate(tree)
    except ValidationError as error:
        raise UserError(listed(target, [_readable(finding) for finding in error.errors()])) from error
    check(server, target)
    return server


def check(server: Server, where: str) -> None:
    """Raises UserError with everything that cannot be had together."""
    found = server.contradictions()
    if found:
        raise UserError(listed(where, found))


def read_keys(file: str | None) -> list[str]:
    """API keys of DLM_RAY_API_KEYS (separated by commas) and of a file (one a line).

    Raises:
        UserError: if the file cannot be read, or a key is too short to be one; it names no key.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        try:
            keys += [line.strip() for line in Path(file).read_text().splitlines()]
        except OSError as error:
            raise UserError(f"http.api_keys_file={file}: {error.strerror}; name a file with one key a line") from error
    keys = [key for key in keys if key and not key.startswith("#")]
    short = sum(len(key) < _LEAST_KEY_CHARACTERS for key in keys)
    if short:
        raise UserError(
            f"{short} of {len(keys)} API keys are shorter than {_LEAST_KEY_CHARACTERS} characters; make longer ones"
        )
    return list(dict.fromkeys(keys))


def _readable(finding: Any) -> str:
    path = ".".join(str(part) for part in finding["loc"])
    if finding["type"] == "extra_forbidden":
        known = list(all_keys(Server))
        near = (
            difflib.get_close_matches(path, known, n=2, cutoff=0.5)
            or [key for key in known if key.rpartition(".")[2] == path][:2]
        )
        return f"{path} is unknown; " + (f"did you mean {' or '.join(near)}?" if near else "see dlm-ray schema server")
    if finding["type"] == "missing":
        return f"{path} is missing"
    return f"{path}={finding['input']!r}: {finding['msg'][0].lower()}{finding['msg'][1:]}"
