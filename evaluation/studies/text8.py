"""The quickstart's corpus in the form of text8 (Matt Mahoney): 26 letters and the space, a token a character."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dlm_ray.data import build, sources
from dlm_ray.data.corpus import write_corpus
from dlm_ray.data.index import load_index
from dlm_ray.data.tokenizer import END_OF_TEXT, identity, load_tokenizer

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LEAST_CHARACTERS = 200


def text8_form(text: str) -> str:
    """Lower case, digits as words, everything that is not a letter a space, and never two spaces."""
    spelled = re.sub("[0-9]", lambda digit: f" {_DIGITS[int(digit[0])]} ", text.lower())
    return re.sub("[^a-z]+", " ", spelled).strip()


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 28 tokens: a to z, the space, and one that begins and ends a text."""
    vocabulary = {letter: number for number, letter in enumerate([*ascii_lowercase, " "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def build_data(
    folder: Path, sequence_length: int, held_out: float = 0.1, max_bytes: int | None = None
) -> dict[str, Any]:
    """A data folder of the corpus in this process, unless it is there; returns the corpus's fingerprint.

    Args:
        folder: gets corpus.json (the fingerprint), data/ and tokenizer/.
        sequence_length: L.
        held_out: share of the documents.
        max_bytes: of the corpus before conversion; all of it if None.
    """
    fingerprint, data = folder / "corpus.json", folder / "data"
    if fingerprint.exists():
        load_index(str(data))
        return dict(json.loads(fingerprint.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    raw, converted = folder / "raw.jsonl", folder / "text8.jsonl"
    corpus = write_corpus(str(raw), max_bytes)
    with raw.open(encoding="utf-8") as lines:  # str.splitlines would also break at U+2028, which JSON leaves as it is
        records = [json.loads(line) for line in lines]
    texts = [text for text in (text8_form(record["text"]) for record in records) if len(text) >= _LEAST_CHARACTERS]
    converted.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_tokenizer(data / "tokenizer")
    own = identity(load_tokenizer(str(data / "tokenizer")))
    settings = build.Settings(own.sha256, sequence_length, held_out, "text", 4096)
    parts = sources.list_parts([str(converted)])
    results = [build.build_part(part, str(data / "tokenizer"), settings, str(data)) for part in parts]
    build.write_index(str(data), results, sequence_length, own, {"settings": {}, "inputs": []})
    raw.unlink()
    found = {**corpus, "documents": len(texts), "characters": sum(map(len, texts))}
    fingerprint.write_text(json.dumps(found))
    return found
