"""The prompt and the options of a chat answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dlm_ray.config.errors import UserError
from dlm_ray.config.sampling import ResolvedSampling
from dlm_ray.generation.sampling import SamplingOptions, resolve_sampling

if TYPE_CHECKING:
    from dlm_ray.generation.text_model import TextModel

_ANSWER_TOKENS, _WHOLE_ANSWER_TOKENS = 512, 128


def check_chat(model: TextModel) -> None:
    """Raise UserError if the model's tokenizer has no chat template."""
    if model.tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer of this model has no chat template, so the model continues text and cannot chat; use "
            "`dlm-ray sample CHECKPOINT --prompt TEXT`, or `sample(prompt)` in Python"
        )


def resolve_chat(
    model: TextModel,
    messages: str | Sequence[Mapping[str, str]],
    length_tokens: int | None,
    options: SamplingOptions,
) -> tuple[ResolvedSampling, list[int], int, SamplingOptions]:
    """Return the resolved options, the prompt's ids, the most tokens of the answer, and the options of the call.

    Raises:
        UserError: if the tokenizer has no chat template, the conversation does not fit the context, or an option is
            wrong.
    """
    check_chat(model)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    prompt_ids = model.encode_chat(messages)
    room = model.sequence_length - 1 - len(prompt_ids)
    target = model.sampling_target()
    options = {**options}
    if options.get("temperature") is None:
        options["temperature"] = 0.0
    if target.kind in ("autoregressive", "block") and options.get("stop") is None:
        options["stop"] = ("end",)
    length = length_tokens
    if length is None:
        length = min(_WHOLE_ANSWER_TOKENS, room) if target.kind in ("whole", "simplex") else _ANSWER_TOKENS
    params = resolve_sampling(options, target, max(1, length))
    model.check_room(length, len(prompt_ids), room, "`messages`", params.block_tokens is None or room < 1)
    return params, prompt_ids, length, options
