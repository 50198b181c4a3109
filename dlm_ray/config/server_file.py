"""Load a service's configuration from a YAML file or a checkpoint, and read its API keys. No message contains a key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from dlm_ray.config.errors import UserError
from dlm_ray.config.mistakes import listed, readable
from dlm_ray.config.paths import local_path
from dlm_ray.config.server import Server
from dlm_ray.config.trees import Tree, parse_yaml, set_key

KEYS_VARIABLE = "DLM_RAY_API_KEYS"
_MIN_KEY_CHARACTERS = 16


def load_server(target: str, overrides: Sequence[str] = ()) -> Server:
    """Load the service of a YAML file, or of a checkpoint with the default settings.

    Args:
        target: a file that ends in .yaml or .yml, else a checkpoint.
        overrides: such as `engine.slots=8`; values are YAML.

    Raises:
        UserError: with every mistake that was found.
    """
    if target.endswith((".yaml", ".yml")):
        file = local_path(target, "the service's file", "a local file")
        if not file.is_file():
            raise UserError(f"there is no file {target!r}")
        tree = parse_yaml(file.read_text(), target, "server")
    else:
        tree = {"checkpoint": target}
    problems = [problem for override in overrides for problem in set_key(tree, override)]
    if problems:
        raise UserError(listed(target, problems))
    return validate_server(tree, target)


def validate_server(tree: Tree, where: str) -> Server:
    """Return the service of a tree of plain values.

    Raises:
        UserError: with every mistake that was found.
    """
    try:
        server = Server.model_validate(tree)
    except ValidationError as error:
        raise UserError(listed(where, list(readable(error, Server)))) from error
    problems = server.contradictions()
    if problems:
        raise UserError(listed(where, problems))
    return server


def read_keys(file: str | None) -> list[str]:
    """Return the API keys of DLM_RAY_API_KEYS (separated by commas) and of a file (one per line), without duplicates.

    Raises:
        UserError: if the file cannot be read, or a key is too short; the message contains no key.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        try:
            keys += [line.strip() for line in Path(file).read_text().splitlines()]
        except OSError as error:
            raise UserError(
                f"http.api_keys_file={file}: {error.strerror}; name a file with one key per line"
            ) from error
    keys = [key for key in keys if key and not key.startswith("#")]
    short = sum(len(key) < _MIN_KEY_CHARACTERS for key in keys)
    if short:
        raise UserError(
            f"{short} of {len(keys)} API keys are shorter than {_MIN_KEY_CHARACTERS} characters; use longer ones"
        )
    return list(dict.fromkeys(keys))
