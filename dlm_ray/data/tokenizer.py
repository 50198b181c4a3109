"""Tokenizers: any fast one of Hugging Face, or a byte-level BPE trained on the text; and the identity that ties shards and checkpoints to one."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dlm_ray.config.errors import UserError
from dlm_ray.data import storage
from dlm_ray.data.special_tokens import refuse_control_tokens, special_tokens
from dlm_ray.models.gguf import is_gguf
from dlm_ray.models.gguf_tokenizer import gguf_tokenizer

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made some ids: the same content has the same sha256, wherever it lies and whatever it is called."""

    name: str
    sha256: str
    vocab_size: int
    """Tokens, added ones included; ids are below it."""
    start_id: int
    """Begins every segment: the beginning-of-text token, or the end-of-text token of tokenizers without one."""
    end_id: int

    def differs_from(self, other: TokenizerIdentity) -> str:
        """What is different, for a message; empty if ids of the one mean what they mean to the other, start and end of a text included."""
        if self.sha256 != other.sha256:
            return f"tokenizer {self.name} (sha256 {self.sha256[:12]}) and not {other.name} ({other.sha256[:12]})"
        if (self.start_id, self.end_id) != (other.start_id, other.end_id):
            return (
                f"start token {self.start_id} and end token {self.end_id}, and not {other.start_id} and {other.end_id}"
            )
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For an index or a manifest."""
        return asdict(self)


def load_tokenizer(name_or_folder: str) -> Any:
    """A fast tokenizer from a folder, local or remote, a GGUF file, or the hub.

    Raises:
        UserError: if there is none, or it has no fast form or no end-of-text token.
    """
    if is_gguf(name_or_folder):
        return _with_end_of_text(gguf_tokenizer(name_or_folder), name_or_folder)
    if storage.is_remote(name_or_folder):
        with tempfile.TemporaryDirectory() as copy:
            for name in storage.names(name_or_folder):
                Path(copy, name).write_bytes(storage.read(storage.join(name_or_folder, name)))
            return load_tokenizer(copy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        where = "the folder holds none" if Path(name_or_folder).is_dir() else "it is no folder, and the hub gave none"
        raise UserError(
            f"no tokenizer at {name_or_folder!r}: {where} ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer {name_or_folder!r} has no fast form (tokenizer.json), which byte counts need; choose another"
        )
    return _with_end_of_text(tokenizer, name_or_folder)


def _with_end_of_text(tokenizer: Any, name: str) -> Any:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name!r} has no end-of-text token (eos_token), which separates documents; choose another"
        )
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, whose end-of-text token also starts a text.

    Raises:
        UserError: if vocab_size has no room for the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise UserError(
            f"--train-tokenizer {vocab_size} is fewer than the 256 bytes and the end-of-text token; ask for 257 or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def identity(tokenizer: Any) -> TokenizerIdentity:
    """What makes this tokenizer this tokenizer."""
    serialised = json.loads(tokenizer.backend_tokenizer.to_str())
    for volatile in ("padding", "truncation"):
        serialised.pop(volatile, None)
    content = json.dumps(serialised, sort_keys=True, ensure_ascii=False).encode()
    end_id = tokenizer.eos_token_id
    return TokenizerIdentity(
        name=Path(tokenizer.name_or_path).name or "trained",
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,  # more than it has tokens, where ids are left out
        start_id=end_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        end_id=end_id,
    )


def encode(tokenizer: Any, documents: list[str]) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each document, and how many raw UTF-8 bytes each token stands for; the bytes of a document sum up exactly.

    The text of a special token inside a document is text like any other (`data.special_tokens`). Where several tokens share a
    character, the last one counts its bytes.

    Raises:
        ControlTokenError: if a document cannot be encoded without a control token, naming the place.
    """
    own = special_tokens(tokenizer)
    encodings = own.for_text.encode_batch(documents, add_special_tokens=False)
    for number, (text, encoding) in enumerate(zip(documents, encodings, strict=True)):
        refuse_control_tokens(own, number, text, encoding)
    return [
        (encoding.ids, _byte_counts(text, encoding.offsets))
        for text, encoding in zip(documents, encodings, strict=True)
    ]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of one text, without a start token; as in `encode`, no text is read as a control token.

    Raises:
        ControlTokenError: if it cannot be encoded without one, naming the place.
    """
    own = special_tokens(tokenizer)
    encoding = own.for_text.encode(text, add_special_tokens=False)
    refuse_control_tokens(own, 0, text, encoding)
    ids: list[int] = encoding.ids
    return ids


def _byte_counts(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """Bytes from where a token starts to where the next one does; what the tokenizer skips goes to the token before it (or the first)."""
    if not offsets:
        return []
    if text.isascii():
        starts = [start for start, _ in offsets]
        total = len(text)
    else:
        at = [0]
        for character in text:
            at.append(at[-1] + len(character.encode("utf-8", "surrogatepass")))
        starts = [at[start] for start, _ in offsets]
        total = at[-1]
    starts[0] = 0
    return [after - before for before, after in zip(starts, [*starts[1:], total], strict=True)]
