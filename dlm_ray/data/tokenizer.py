"""Tokenizers of Hugging Face, and a trained byte-level BPE: load, train, identify, and encode text."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dlm_ray.config.errors import UserError
from dlm_ray.data import storage
from dlm_ray.data.identity import TokenizerIdentity
from dlm_ray.data.special_tokens import refuse_control_tokens, special_tokens
from dlm_ray.models.gguf import is_gguf
from dlm_ray.models.gguf_tokenizer import gguf_tokenizer

FastTokenizer = PreTrainedTokenizerFast
"""A tokenizer of this package: always a fast one, whose byte offsets are known."""
END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name_or_folder: str) -> FastTokenizer:
    """Load a fast tokenizer from a folder, local or remote, a GGUF file, or the Hugging Face hub.

    Raises:
        UserError: if no tokenizer is found, or it has no fast form or no end-of-text token.
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
        where = "the folder has none" if Path(name_or_folder).is_dir() else "it is not a folder, and the hub has none"
        raise UserError(
            f"no tokenizer at {name_or_folder!r}: {where} ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer {name_or_folder!r} has no fast form (tokenizer.json), which byte counts need; choose another"
        )
    return _with_end_of_text(tokenizer, name_or_folder)


def _with_end_of_text(tokenizer: FastTokenizer, name: str) -> FastTokenizer:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name!r} has no end-of-text token (eos_token), which separates documents; choose another"
        )
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` tokens, whose end-of-text token also starts a text.

    Raises:
        UserError: if `vocab_size` is too small for the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise UserError(
            f"train_tokenizer_vocab={vocab_size} is fewer than the 256 bytes and the end-of-text token; use 257 or more"
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
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def identity(tokenizer: FastTokenizer) -> TokenizerIdentity:
    """Return the identity of a tokenizer, which does not depend on padding and truncation."""
    serialised = json.loads(tokenizer.backend_tokenizer.to_str())
    for volatile in ("padding", "truncation"):
        serialised.pop(volatile, None)
    content = json.dumps(serialised, sort_keys=True, ensure_ascii=False).encode()
    end_id = tokenizer.eos_token_id
    return TokenizerIdentity(
        name=Path(tokenizer.name_or_path).name or "trained",
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,  # more than the number of tokens if ids have gaps
        start_id=end_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        end_id=end_id,
    )


def encode(tokenizer: FastTokenizer, documents: list[str]) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each document, and the number of raw UTF-8 bytes that each token stands for.

    The bytes of a document sum to its length. The text of a special token inside a document stays text
    (`data.special_tokens`). If several tokens share a character, the last one counts its bytes.

    Raises:
        ControlTokenError: if a document cannot be encoded without a control token; the error names the place.
    """
    special = special_tokens(tokenizer)
    encodings = special.for_text.encode_batch(documents, add_special_tokens=False)
    for number, (text, encoding) in enumerate(zip(documents, encodings, strict=True)):
        refuse_control_tokens(special, number, text, encoding)
    return [
        (encoding.ids, _byte_counts(text, encoding.offsets))
        for text, encoding in zip(documents, encodings, strict=True)
    ]


def encode_text(tokenizer: FastTokenizer, text: str) -> list[int]:
    """Return the token ids of one text, without a start token; as in `encode`, no text becomes a control token.

    Raises:
        ControlTokenError: if the text cannot be encoded without a control token; the error names the place.
    """
    special = special_tokens(tokenizer)
    encoding = special.for_text.encode(text, add_special_tokens=False)
    refuse_control_tokens(special, 0, text, encoding)
    ids: list[int] = encoding.ids
    return ids


def _byte_counts(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """Return the bytes from the start of each token to the start of the next one.

    Text that the tokenizer skips counts for the preceding token, or for the first one.
    """
    if not offsets:
        return []
    if text.isascii():
        starts = [start for start, _ in offsets]
        total = len(text)
    else:
        byte_offsets = [0]
        for character in text:
            byte_offsets.append(byte_offsets[-1] + len(character.encode("utf-8", "surrogatepass")))
        starts = [byte_offsets[start] for start, _ in offsets]
        total = byte_offsets[-1]
    starts[0] = 0
    return [after - before for before, after in zip(starts, [*starts[1:], total], strict=True)]
