"""Messages -> token ids by the tokenizer's chat template, the only source of control tokens: what a message says is text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dlm_ray.config.errors import UserError
from dlm_ray.data.special_tokens import CLOSE, OPEN, SpecialTokens, special_tokens

_ESCAPED = re.compile(f"{CLOSE}([0-9]+){CLOSE}")


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], start_id: int) -> list[int]:
    """Return the ids of messages and of what begins the answer, without the start token that the template may have written in front.

    The template and the messages are encoded as one text, so that a token may reach from one into the other; but special tokens that a
    message spells out stay text.

    Args:
        tokenizer: with a chat template.
        messages: role and content.
        start_id: the token that the caller puts in front, once.

    Raises:
        UserError: if a message cannot be encoded without a control token.
        Exception: whatever the template, which is a program of its author's, raises.
    """
    own = special_tokens(tokenizer)
    # Where a template knows no such role, it would leave the message out without a word.
    roles = {} if "developer" in str(tokenizer.chat_template) else {"developer": "system"}
    masked = [
        {
            **message,
            "role": roles.get(message["role"], message["role"]),
            "content": _masked(own, message["content"], f"messages.{place}.content"),
        }
        for place, message in enumerate(messages)
    ]
    text = tokenizer.apply_chat_template(masked, add_generation_prompt=True, tokenize=False)
    text = _ESCAPED.sub(lambda found: chr(int(found[1])), _named(own, text))
    ids: list[int] = own.for_templates.encode(text, add_special_tokens=False).ids
    while ids and ids[0] == start_id:
        ids = ids[1:]
    return ids


def _masked(own: SpecialTokens, content: str, where: str) -> str:
    """The content with the first character of every special token written as its number, so that nothing takes it for one."""
    for character, text in enumerate(content):
        if text in (OPEN, CLOSE):
            raise UserError(
                f"{where}, character {character}: U+{ord(text):04X} is a noncharacter of Unicode, which no text may hold; take it out"
            )
        if text in own.ids:
            raise UserError(
                f"{where}, character {character}: the tokenizer has nothing but its control token {text!r} for this character; take it out"
            )
    starts = {found.start() for found in own.pattern.finditer(content)}
    return "".join(f"{CLOSE}{ord(text)}{CLOSE}" if place in starts else text for place, text in enumerate(content))


def _named(own: SpecialTokens, text: str) -> str:
    """A template's text with every special token under its name."""
    written, place = [], 0
    for found in own.pattern.finditer(text):
        if found.start() >= place:  # not within the one before
            written += [text[place : found.start()], own.names.get(found[1], found[1])]
            place = found.end(1)
    return "".join([*written, text[place:]])
