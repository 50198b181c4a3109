"""Separate control tokens (the start, end and other special tokens of a tokenizer) from text.

Text of users and of data stays text, even if it spells out a special token. A plain tokenizer breaks this rule: it
first searches for the strings of its special tokens, and its model may have them as pieces of the vocabulary (Unigram,
WordPiece). So text is encoded by a copy in which every special token has the same id and a name that no text contains.
Where a copy cannot help (a special token of a single character, or one that also stands for unknown text), the text is
refused, and the error names the place. Only a chat template (`data.chat`) produces control tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

from tokenizers import Encoding, Tokenizer

from dlm_ray.config.errors import UserError

if TYPE_CHECKING:
    from dlm_ray.data.tokenizer import FastTokenizer

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which text must not contain; they enclose the names of special tokens."""


class ControlTokenError(UserError):
    """A text that this tokenizer cannot encode without a control token."""

    def __init__(self, number: int, character: int, reason: str):
        super().__init__(f"character {character}: {reason}")
        self.number = number
        """The number of the text among those that are encoded together."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, and copies of the tokenizer that tell them from text."""

    ids: dict[str, int]
    """The id of each special token, by its string."""
    forbidden: frozenset[int]
    """The ids that no text may contain: all, except a token that only stands for unknown text."""
    _serialised: str

    @cached_property
    def names(self) -> dict[str, str]:
        """The name of each string in the copies; a single character has none: it may have no other token."""
        return {text: f"{OPEN}{token}{CLOSE}" for text, token in self.ids.items() if len(text) > 1}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A pattern for the longest special token at a position, as group 1; matches may overlap."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile(f"(?=({'|'.join(map(re.escape, longest_first))}))" if longest_first else "(?!)")

    @cached_property
    def for_text(self) -> Tokenizer:
        """A copy that never encodes text as a special token."""
        backend = self._renamed()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def for_templates(self) -> Tokenizer:
        """A copy that encodes `names`, and no other text, as special tokens."""
        backend = self._renamed()
        backend.encode_special_tokens = False
        return backend

    def _renamed(self) -> Tokenizer:
        """Return a copy with renamed special tokens, without truncation (loses text) and padding (adds tokens)."""
        tree, names = json.loads(self._serialised), self.names
        tree["truncation"] = tree["padding"] = None
        for token in tree["added_tokens"]:
            if token["content"] in names:
                # Search for names before normalization: a normalizer may turn them into ordinary text.
                token.update(content=names[token["content"]], special=True, normalized=False)
        model = tree["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, list):  # a Unigram model
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        elif vocabulary is not None:
            model["vocab"] = {names.get(piece, piece): token for piece, token in vocabulary.items()}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if model.get("merges"):
            prefix = len(model.get("continuing_subword_prefix") or "")
            model["merges"] = [
                [a, b] for a, b in model["merges"] if names.keys().isdisjoint((a, b, a + b, a + b[prefix:]))
            ]
        backend = Tokenizer.from_str(json.dumps(tree))
        moved = [text for text, name in names.items() if backend.token_to_id(name) != self.ids[text]]
        if moved:
            raise UserError(
                f"this tokenizer's special tokens {', '.join(moved)} cannot be told from text; choose another tokenizer"
            )
        return backend


_CACHE: WeakKeyDictionary[FastTokenizer, SpecialTokens] = WeakKeyDictionary()


def special_tokens(tokenizer: FastTokenizer) -> SpecialTokens:
    """Return the special tokens of a fast tokenizer: tokens marked as special, and tokens with a role (start, ...)."""
    if tokenizer not in _CACHE:
        ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = [str(text) for text in tokenizer.all_special_tokens]
        ids |= {name: cast("int", tokenizer.convert_tokens_to_ids(name)) for name in names}
        roles = ("bos", "eos", "pad", "sep", "cls", "mask")
        role_ids = {getattr(tokenizer, f"{role}_token_id", None) for role in roles}
        only_unknown = {tokenizer.unk_token_id} - role_ids
        _CACHE[tokenizer] = SpecialTokens(
            ids, frozenset(ids.values()) - only_unknown, tokenizer.backend_tokenizer.to_str()
        )
    return _CACHE[tokenizer]


def refuse_control_tokens(special: SpecialTokens, number: int, text: str, encoding: Encoding) -> None:
    """Raise ControlTokenError if the encoding of text `number` contains a control token."""
    if special.forbidden.isdisjoint(encoding.ids):
        return
    position = next(i for i, token in enumerate(encoding.ids) if token in special.forbidden)
    first, last = encoding.offsets[position]
    token_id = encoding.ids[position]
    control = next(string for string, token in special.ids.items() if token == token_id)
    raise ControlTokenError(
        number,
        first,
        f"the tokenizer encodes the text {text[first:last]!r} only as its control token {control!r} (id {token_id}); "
        "remove the text, or choose another tokenizer",
    )
