"""Control tokens apart from text: the start, end and other special tokens of a tokenizer, which no text is ever read as.

The one rule: text of users and of data is text, also where it spells a special token out. A plain tokenizer does not keep to it: it looks for the
strings of its special tokens first, and its model may know them as pieces of the vocabulary, too (Unigram, WordPiece). So text is encoded by a copy
in which every special token has a name that no text has, under the same id. Where a copy cannot help (a special token of a single character, or one
that also stands for unknown text), the text is refused with the place. Control tokens come from a chat template (`data.chat`) and from nothing else.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from dlm_ray.config.errors import UserError

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which are not for interchange: names of special tokens are put in them."""


class ControlTokenError(UserError):
    """A text that this tokenizer cannot encode without a control token."""

    def __init__(self, number: int, character: int, reason: str):
        super().__init__(f"character {character}: {reason}")
        self.number = number
        """Of the text among those that were encoded together."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer, and copies of the tokenizer that tell them from text."""

    ids: dict[str, int]
    """By the string that spells it."""
    forbidden: frozenset[int]
    """Ids that no text may hold: all, but for a token that stands for unknown text and for nothing else."""
    _serialised: str

    @cached_property
    def names(self) -> dict[str, str]:
        """String -> the name in the copies. One character may be all that a tokenizer has for this character, so it keeps its name."""
        return {text: f"{OPEN}{token}{CLOSE}" for text, token in self.ids.items() if len(text) > 1}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the longest special token that begins at a place, as group 1; matches overlap."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile(f"(?=({'|'.join(map(re.escape, longest_first))}))" if longest_first else "(?!)")

    @cached_property
    def for_text(self) -> Tokenizer:
        """Encodes text, whatever it spells out."""
        backend = self._renamed()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def for_templates(self) -> Tokenizer:
        """Reads `names` as special tokens, and nothing else."""
        backend = self._renamed()
        backend.encode_special_tokens = False
        return backend

    def _renamed(self) -> Tokenizer:
        """A copy in which special tokens have their `names`; without truncation and padding, the one loses text, the other adds tokens."""
        tree, names = json.loads(self._serialised), self.names
        tree["truncation"] = tree["padding"] = None
        for token in tree["added_tokens"]:
            if token["content"] in names:
                # Names are looked for in the text as it is: a normaliser may leave of them what a text has, too.
                token.update(content=names[token["content"]], special=True, normalized=False)
        model = tree["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, list):  # of Unigram
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


_KNOWN: WeakKeyDictionary[Any, SpecialTokens] = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the special tokens of a fast tokenizer: those that it marks as special, and those that have a role (start, end, padding, ...)."""
    if tokenizer not in _KNOWN:
        ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids |= {str(text): tokenizer.convert_tokens_to_ids(str(text)) for text in tokenizer.all_special_tokens}
        roles = ("bos", "eos", "pad", "sep", "cls", "mask")
        others = {getattr(tokenizer, f"{role}_token_id", None) for role in roles}
        is_text = {tokenizer.unk_token_id} - others
        _KNOWN[tokenizer] = SpecialTokens(ids, frozenset(ids.values()) - is_text, tokenizer.backend_tokenizer.to_str())
    return _KNOWN[tokenizer]


def refuse_control_tokens(own: SpecialTokens, number: int, text: str, encoding: Any) -> None:
    """Raises ControlTokenError if the encoding of text `number` holds a control token."""
    if own.forbidden.isdisjoint(encoding.ids):
        return
    place = next(place for place, token in enumerate(encoding.ids) if token in own.forbidden)
    first, last = encoding.offsets[place]
    spelled = next(spelled for spelled, token in own.ids.items() if token == encoding.ids[place])
    raise ControlTokenError(
        number,
        first,
        f"the tokenizer has nothing but its control token {spelled!r} (id {encoding.ids[place]}) for the text {text[first:last]!r}; take it out, or "
        "choose another tokenizer",
    )
