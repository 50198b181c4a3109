"""The quickstart's corpus in the form of text8 (Matt Mahoney): 26 letters and the space, one token per character."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import ascii_lowercase

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.data import build, sources
from dlm_ray.data.corpus import write_corpus
from dlm_ray.data.index import load_index
from dlm_ray.data.tokenizer import END_OF_TEXT, identity, load_tokenizer

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MIN_CHARACTERS = 200
"""Shorter documents are left out."""
_SEQUENCES_PER_SHARD = 4096


def text8_form(text: str) -> str:
    """Return the text in lower case, digits spelled out, and each run of other characters replaced by one space."""
    spelled = re.sub("[0-9]", lambda digit: f" {_DIGITS[int(digit[0])]} ", text.lower())
    return re.sub("[^a-z]+", " ", spelled).strip()


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 28 tokens: a to z, the space, and one that starts and ends a text."""
    vocabulary = {letter: number for number, letter in enumerate([*ascii_lowercase, " "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def build_data(folder: Path, sequence_length: int, held_out: float = 0.1, max_bytes: int | None = None) -> JsonObject:
    """Build a data folder of the corpus in this process, unless it exists, and return the corpus's fingerprint.

    Args:
        folder: the folder for corpus.json (the fingerprint) and data/ with its tokenizer/.
        sequence_length: L.
        held_out: the share of the documents in the held-out split.
        max_bytes: the size of the corpus before conversion; the whole corpus if None.

    Returns:
        The fields of `write_corpus`, and the numbers of `documents` and `characters` after conversion.
    """
    fingerprint_file, data = folder / "corpus.json", folder / "data"
    if fingerprint_file.exists():
        load_index(str(data))  # fails if the folder is not whole
        return dict(json.loads(fingerprint_file.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    raw, converted = folder / "raw.jsonl", folder / "text8.jsonl"
    corpus = write_corpus(str(raw), max_bytes)
    with raw.open(encoding="utf-8") as lines:  # str.splitlines would also break at U+2028, which JSON does not escape
        records = [json.loads(line) for line in lines]
    texts = [text for text in (text8_form(record["text"]) for record in records) if len(text) >= _MIN_CHARACTERS]
    converted.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_tokenizer(data / "tokenizer")
    tokenizer = identity(load_tokenizer(str(data / "tokenizer")))
    settings = build.Settings(
        tokenizer_sha256=tokenizer.sha256,
        sequence_length=sequence_length,
        held_out=held_out,
        text_field="text",
        sequences_per_shard=_SEQUENCES_PER_SHARD,
    )
    chunks = sources.list_chunks([str(converted)])
    results = [build.build_chunk(chunk, str(data / "tokenizer"), settings, str(data)) for chunk in chunks]
    build.write_index(str(data), results, sequence_length, tokenizer, {"settings": {}, "inputs": []})
    raw.unlink()
    fingerprint = {**corpus, "documents": len(texts), "characters": sum(map(len, texts))}
    fingerprint_file.write_text(json.dumps(fingerprint))
    return fingerprint
