"""The `index.json` of a data folder: its shards, its tokenizer, and the hashes that a reader checks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.data import storage
from dlm_ray.data.identity import TokenizerIdentity

if TYPE_CHECKING:
    from dlm_ray.data.tokenizer import FastTokenizer

FORMAT = 2
NAME = "index.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Shard(_Frozen):
    """One .tar file of sequences."""

    file: str
    part: int
    """Number of the `sources.SourceChunk` that the shard holds; documents are numbered within a chunk."""
    sequences: int
    sha256: str
    size_bytes: int


class Split(_Frozen):
    """The `train` or the `held_out` split of a data folder."""

    sequences: int
    tokens: int
    """Scored tokens, without start tokens and padding."""
    bytes: int
    documents: int
    shards: tuple[Shard, ...]


class Index(_Frozen):
    """The content of `index.json`."""

    format: int
    sequence_length: int
    """L, the number of tokens of every sequence."""
    tokenizer: TokenizerIdentity
    splits: dict[str, Split]
    built_from: dict[str, object]


def load_index(path: str) -> Index:
    """Return the index of a data folder, local or remote.

    Raises:
        UserError: if the folder has no index, or one of another format.
        DamageError: if the index cannot be read.
    """
    name = storage.join(str(path), NAME)
    if not storage.exists(name):
        raise UserError(
            f"{path} is not a data folder: it has no {NAME}; build one with `dlm-ray data build SOURCE... --out {path}`"
        )
    try:
        fields = json.loads(storage.read(name))
        found = fields.get("format", FORMAT)
        if found != FORMAT:
            action = "install a newer dlm-ray" if found > FORMAT else "build the data again with `dlm-ray data build`"
            raise UserError(f"{name} has format {found}, and this version reads format {FORMAT}; {action}")
        return Index.model_validate(fields)
    except (ValidationError, json.JSONDecodeError) as error:
        raise DamageError(f"{name} cannot be read: {str(error).splitlines()[0]}; build the data again") from error


def load_data_tokenizer(path: str) -> FastTokenizer:
    """Return the tokenizer that a data folder was built with; the folder, local or remote, contains it."""
    from dlm_ray.data.tokenizer import load_tokenizer  # imports transformers, which reading shards does without

    return load_tokenizer(storage.join(path, "tokenizer"))
