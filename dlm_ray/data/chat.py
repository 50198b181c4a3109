"""Encode chat messages with the tokenizer's chat template, the only source of control tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dlm_ray.config.errors import UserError
from dlm_ray.data.special_tokens import CLOSE, OPEN, SpecialTokens, special_tokens
from dlm_ray.data.tokenizer import FastTokenizer

_ESCAPED = re.compile(f"{CLOSE}([0-9]+){CLOSE}")


def encode_chat(tokenizer: FastTokenizer, messages: Sequence[Mapping[str, str]], start_id: int) -> list[int]:
    """Return the ids of the messages and of the answer's prefix, without a start token that the template may write.

    The template and the messages are encoded as one text, so a token may span both; a special token that a message
    spells out stays text.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: mappings with `role` and `content`.
        start_id: the start token, which the caller prepends once.

    Raises:
        UserError: if a message cannot be encoded without a control token.
        Exception: any error of the template, which is a program of the tokenizer's author.
    """
    special = special_tokens(tokenizer)
    # A template that does not know the role would silently drop the message.
    roles = {} if "developer" in str(tokenizer.chat_template) else {"developer": "system"}
    masked = [
        {
            **message,
            "role": roles.get(message["role"], message["role"]),
            "content": _masked(special, message["content"], f"messages.{place}.content"),
        }
        for place, message in enumerate(messages)
    ]
    text = tokenizer.apply_chat_template(masked, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str), "without tokenization, a template gives text"
    text = _ESCAPED.sub(lambda match: chr(int(match[1])), _named(special, text))
    ids: list[int] = special.for_templates.encode(text, add_special_tokens=False).ids
    while ids and ids[0] == start_id:
        ids = ids[1:]
    return ids


def _masked(special: SpecialTokens, content: str, where: str) -> str:
    """Return the content with the first character of every special token escaped, so that it stays text."""
    for character, text in enumerate(content):
        if text in (OPEN, CLOSE):
            raise UserError(
                f"{where}, character {character}: U+{ord(text):04X} is a noncharacter of Unicode, which text may not "
                "contain; remove it"
            )
        if text in special.ids:
            raise UserError(
                f"{where}, character {character}: the tokenizer encodes this character only as its control "
                f"token {text!r}; remove the character"
            )
    starts = {match.start() for match in special.pattern.finditer(content)}
    return "".join(f"{CLOSE}{ord(text)}{CLOSE}" if place in starts else text for place, text in enumerate(content))


def _named(special: SpecialTokens, text: str) -> str:
    """Return a template's text with every special token replaced by its name."""
    written, place = [], 0
    for match in special.pattern.finditer(text):
        if match.start() >= place:  # not within the previous one
            written += [text[place : match.start()], special.names.get(match[1], match[1])]
            place = match.end(1)
    return "".join([*written, text[place:]])
