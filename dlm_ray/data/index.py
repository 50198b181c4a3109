"""`index.json`: what a folder of shards holds, by which tokenizer, and the hashes that a reader checks."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.data import storage
from dlm_ray.data.tokenizer import TokenizerIdentity, load_tokenizer

FORMAT = 1
NAME = "index.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Shard(_Frozen):
    """One .tar file of rows."""

    file: str
    part: int
    """Documents are numbered within a part."""
    rows: int
    sha256: str
    size_bytes: int


class Split(_Frozen):
    """`train` or `held_out`."""

    rows: int
    tokens: int
    """Scored tokens: neither start tokens nor padding."""
    bytes: int
    documents: int
    shards: tuple[Shard, ...]


class Index(_Frozen):
    """A data folder."""

    format: int
    sequence_length: int
    """L."""
    tokenizer: TokenizerIdentity
    splits: dict[str, Split]
    built_from: dict[str, Any]


def load_index(path: str) -> Index:
    """The index of a data folder, local or remote.

    Raises:
        UserError: if there is none, or it is of a newer format.
        DamageError: if it cannot be read.
    """
    name = storage.join(str(path), NAME)
    if not storage.exists(name):
        raise UserError(
            f"{path} is no data folder: it has no {NAME}; build one with `dlm-ray data build SOURCE... --out {path}`"
        )
    try:
        fields = json.loads(storage.read(name))
        if fields.get("format", 0) > FORMAT:
            raise UserError(
                f"{name} has format {fields['format']}, and this version reads up to {FORMAT}; install a newer dlm-ray"
            )
        return Index.model_validate(fields)
    except (ValidationError, json.JSONDecodeError) as error:
        raise DamageError(f"{name} cannot be read: {str(error).splitlines()[0]}; build the data again") from error


def load_data_tokenizer(path: str) -> Any:
    """The tokenizer that a data folder was made with, which lies in the folder, local or remote."""
    return load_tokenizer(storage.join(path, "tokenizer"))
