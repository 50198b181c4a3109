"""`manifest.json`: the description of a checkpoint, which makes its directory one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import tensorstore as ts
from pydantic import BaseModel, ConfigDict, ValidationError

from dlm_ray.checkpoint import arrays
from dlm_ray.checkpoint.arrays import Spec
from dlm_ray.checkpoint.files import FileDigest
from dlm_ray.config.errors import DamageError
from dlm_ray.config.manifest_fields import (
    Capabilities,
    CursorFields,
    JsonObject,
    ModelFields,
    RunFields,
    Stored,
    TokenizerFields,
)

FORMAT = 3
MANIFEST = "manifest.json"


class ArrayEntry(BaseModel):
    """The shape, type and chunks of one array of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]


class Manifest(BaseModel):
    """The description of a checkpoint, written last and with its own hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    step: int
    recipe: JsonObject
    tokenizer: Stored[TokenizerFields]
    model: Stored[ModelFields]
    capabilities: Stored[Capabilities]
    cursor: Stored[CursorFields]
    extra: Stored[RunFields]
    arrays: dict[str, ArrayEntry]
    files: dict[str, FileDigest] = {}
    """By name, the files of a checkpoint on a local disk; empty in a bucket."""
    sha256: str


def read_manifest(directory: str) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        DamageError: if there is no manifest, it is damaged, or this version does not read its format.
    """
    content = read_key(arrays.key_value_store(directory), MANIFEST, directory)
    if content is None:
        raise DamageError(
            f"{directory} is not a checkpoint: it has no {MANIFEST} (a run that stopped during a save leaves such a "
            "directory)"
        )
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            action = "install a newer dlm-ray" if fields["format"] > FORMAT else "train the run again with this version"
            raise DamageError(
                f"{directory}/{MANIFEST} has format {fields['format']}, and this version reads format {FORMAT}; "
                f"{action}"
            )
        manifest = Manifest.model_validate(fields)
        digest = digest_of(fields)
    except (ValueError, TypeError, KeyError, ValidationError) as error:
        if isinstance(error, DamageError):
            raise
        raise DamageError(f"{directory}/{MANIFEST} is damaged: {str(error).splitlines()[0]}") from error
    if digest != manifest.sha256:
        raise DamageError(
            f"{directory}/{MANIFEST} is damaged: its sha256 is {digest}, and it records {manifest.sha256}"
        )
    if content != serialize(fields):
        raise DamageError(f"{directory}/{MANIFEST} is damaged: its bytes differ from the format of its content")
    return manifest


def serialize(content: Mapping[str, object]) -> bytes:
    """Return the bytes of a manifest."""
    return json.dumps(content, indent=1, sort_keys=True).encode()


def digest_of(fields: Mapping[str, object]) -> str:
    """Return the sha256 of a manifest's fields, other than the sha256."""
    return hashlib.sha256(json.dumps({**fields, "sha256": ""}, sort_keys=True).encode()).hexdigest()


def read_key(base: Spec, name: str, directory: str) -> bytes | None:
    """Return the content of a file in the directory of a checkpoint; None if it does not exist."""
    try:
        result = ts.KvStore.open(base).result().read(name).result(timeout=arrays.ANSWER_SECONDS)
    except (ValueError, TimeoutError) as error:
        raise arrays.as_user_error(error, directory) from error
    return bytes(result.value) if result.state == "value" else None
