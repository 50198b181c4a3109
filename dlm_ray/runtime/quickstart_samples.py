"""What the quickstart shows of its models: answers with their cost, a text as it is denoised, an infilling."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dlm_ray.data.index import load_index
from dlm_ray.diffusion.objectives.block import is_context_causal
from dlm_ray.diffusion.samplers.adjust import banned
from dlm_ray.diffusion.samplers.generate import generate_blocks
from dlm_ray.diffusion.samplers.requests import Request, Stops
from dlm_ray.diffusion.samplers.rules import Canvas, SelectionRule
from dlm_ray.evaluation.generation import ngram_statistics
from dlm_ray.generation.sampling import SamplingOptions, resolve_sampling
from dlm_ray.generation.text_model import TextModel
from dlm_ray.models.stock import StockModel

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Write one sentence about the sea.")
PROMPTS = ("The name of the file", "This module provides", "def read(self")
"""Texts to continue, for a model without a chat template."""
THRESHOLD = 0.9
"""A denoising step accepts all tokens with at least this probability, and always the most probable one."""
INFILL_PREFIX = '''def read_lines(path):
    """Return the lines of a text file."""
'''
INFILL_SUFFIX = """
    return lines
"""
_LEADS = ("", "Note that", "We know that", "It is said that", "Everybody knows that", "As we all know,")


@dataclass(frozen=True)
class Lengths:
    """The numbers and the lengths of the texts."""

    answer_tokens: int = 48
    num_samples: int = 100
    sample_tokens: int = 128
    sample_steps: int = 24
    infill_tokens: int = 24


@dataclass
class Denoising:
    """A generated text, and the forward pass after which each of its tokens is known."""

    prompt: str
    tokens: list[str] = field(default_factory=list)
    """The text of each token."""
    steps: list[int] = field(default_factory=list)
    """For each token the number of the step, from 1."""


@dataclass(frozen=True)
class Answer:
    """A generated text and its cost."""

    text: str
    tokens: int
    forwards: int
    """Network calls, those for the prompt included."""
    seconds: float
    """Time of these calls and of everything between them."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, tokens per forward pass and tokens per second."""
        per_forward = self.tokens / self.forwards
        return {**asdict(self), "tokens_per_forward": per_forward, "tokens_per_second": self.tokens / self.seconds}


def show_texts(
    base: TextModel, adapted: TextModel, data: str, lengths: Lengths, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return the texts of the report.

    Returns:
        `answers`, `denoising` and `threshold`; `infill`, None if the model cannot; `samples`, None for a block model.
    """
    exchanges, denoising = answers(base, adapted, lengths.answer_tokens, progress)
    shown = {"answers": exchanges, "denoising": vars(denoising), "threshold": THRESHOLD, "samples": None}
    if adapted.sampling_target().kind != "whole":
        return shown | {"infill": infill_block(adapted, base)}
    middle = adapted.infill(INFILL_PREFIX, INFILL_SUFFIX, length_tokens=lengths.infill_tokens, temperature=0.5)[0]
    texts = adapted.sample(
        num_samples=lengths.num_samples,
        length_tokens=min(lengths.sample_tokens, load_index(data).sequence_length - 1),
        steps=lengths.sample_steps,
        rule="ancestral",
        on_step=lambda step, steps, canvas: progress(step, steps),
    )
    shown["infill"] = {"prefix": INFILL_PREFIX, "written": middle, "suffix": INFILL_SUFFIX}
    shown["samples"] = {**ngram_statistics(texts, adapted.tokenizer, data), "texts": texts[:3]}
    return shown


def answers(
    base: TextModel, adapted: TextModel, length: int, progress: Callable[[int, int], None]
) -> tuple[list[dict[str, Any]], Denoising]:
    """Answer the questions greedily with the base, stock transformers and the diffusion model.

    Returns:
        Per question `prompt`, `base`, `transformers` and `adapted`; and how the first answer was denoised.
    """
    stock = StockModel(base.denoiser)
    has_chat = bool(base.tokenizer.chat_template)
    prompts = QUESTIONS if has_chat else PROMPTS
    end_id = base.tokenizer_identity.end_id
    for model in (base, adapted):  # the first calls of a process are slow
        generate(model, prompts[0], False, 4)
    stock.greedy(base.prompt_ids(base.encode(prompts[0])), 4, end_id)
    exchanges, first = [], Denoising(prompts[0])
    for number, prompt in enumerate(prompts):
        progress(number, len(prompts))
        ids = base.prompt_ids(_encode(base, prompt, has_chat))
        started = time.perf_counter()
        reference = stock.greedy(ids, length, end_id)
        seconds = time.perf_counter() - started
        exchanges.append(
            {
                "prompt": prompt,
                "base": generate(base, prompt, has_chat, length).as_dict(),
                "transformers": _answer(base, reference, len(reference), seconds).as_dict(),
                "adapted": generate(adapted, prompt, has_chat, length, None if number else first).as_dict(),
            }
        )
    return exchanges, first


def generate(model: TextModel, prompt: str, has_chat: bool, length: int, record: Denoising | None = None) -> Answer:
    """Return the greedy continuation of a prompt, or the answer to it, of at most `length` tokens.

    Args:
        model: a block model denoises with `threshold`; others have the default rule.
        prompt: a question if `has_chat`, else a text to continue.
        has_chat: whether to apply the chat template.
        length: the largest number of tokens.
        record: receives the tokens and the steps of their appearance.
    """
    target = model.sampling_target()
    if target.kind == "whole":
        return _whole_canvas(model, prompt, length, record)
    options: SamplingOptions = {"temperature": 0.0, "stop": ["end"]}
    if target.kind == "block":
        options |= {"rule": "threshold", "threshold": THRESHOLD}
    params = resolve_sampling(options, target, length)
    rule, size = model.rule(params), params.block_tokens
    assert isinstance(rule, SelectionRule) and size is not None, "an autoregressive or a block model has blocks"
    ids = model.prompt_ids(_encode(model, prompt, has_chat))
    end_id = model.tokenizer_identity.end_id
    request = Request(ids, length, stops=Stops(end_id))
    appearances = _Appearances(first=len(ids), block_tokens=size)
    started = time.perf_counter()
    [output] = generate_blocks(
        model.denoiser,
        [request],
        rule,
        block_tokens=size,
        context_tokens=model.sequence_length,
        num_steps=params.steps,
        temperature=0.0,
        adjust=banned(model.forbidden_token_ids(False, ())),
        is_context_causal=is_context_causal(model.objective),
        on_step=appearances,
    ).texts
    seconds = time.perf_counter() - started
    if record is not None:
        shown = output.ids[:-1] if output.stopped_by == "end" else output.ids
        record.tokens = token_texts(model.tokenizer, shown)
        record.steps = appearances.steps(len(shown))
    return _answer(model, output.ids, output.num_denoising_calls + output.num_cache_calls, seconds)


def infill_block(adapted: TextModel, base: TextModel) -> dict[str, str] | None:
    """Let a block model write the beginning of a block whose end is given, which its base cannot see.

    Returns:
        `prefix`, `written` and `suffix`, and `base`, which is the base's continuation of the prefix; None if no prefix
        of this tokenizer ends with a block.
    """
    size = adapted.sampling_target().block_tokens
    suffix = " is Paris."
    num_free = (size or 0) - len(adapted.encode(suffix))
    for lead in _LEADS:
        prefix = f"{lead} the capital of".strip()
        prefix = prefix[0].upper() + prefix[1:]
        if num_free > 0 and size and (1 + len(adapted.encode(prefix))) % size == 0:
            text = adapted.sample(prefix, length_tokens=size, force={num_free: suffix}, temperature=0.0)[0]
            alone = base.sample(prefix, length_tokens=num_free, temperature=0.0)[0]
            return {"prefix": prefix, "written": text.removesuffix(suffix), "suffix": suffix, "base": alone}
    return None


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; a character of several tokens belongs to the last of them."""
    texts, known = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        is_partial = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids)
        texts.append("" if is_partial else text[len(known) :])
        known = known if is_partial else text
    return texts


class _Appearances:
    """Notes at which step each position of a text by blocks is no longer masked."""

    def __init__(self, first: int, block_tokens: int):
        self._first, self._size = first, block_tokens
        self._num_steps = 0
        self._at: dict[int, int] = {}

    def __call__(self, blocks_done: int, blocks: int, canvas: Canvas) -> None:
        self._num_steps += 1
        start = (self._first // self._size + blocks_done) * self._size
        known = list(range(self._first, start))
        is_masked = canvas.is_masked[0].tolist() if len(canvas.is_masked) else []
        if any(is_masked):  # else it is a finished block, which is shown until the cache has it
            known += [start + offset for offset, masked in enumerate(is_masked) if not masked]
        for position in known:
            self._at.setdefault(position, self._num_steps)

    def steps(self, num_tokens: int) -> list[int]:
        """Return the step of each generated token, counted from 1 without gaps."""
        steps = [self._at.get(self._first + index, self._num_steps) for index in range(num_tokens)]
        order = {step: number for number, step in enumerate(sorted(set(steps)), 1)}
        return [order[step] for step in steps]


def _whole_canvas(model: TextModel, prompt: str, length: int, record: Denoising | None) -> Answer:
    first = 1 + len(model.encode(prompt))
    length = min(length, model.sequence_length - first)
    at: dict[int, int] = {}
    last: list[int] = []

    def on_step(step: int, steps: int, canvas: Canvas) -> None:
        for position, masked in enumerate(canvas.is_masked[0, first : first + length].tolist()):
            if not masked:
                at.setdefault(position, step)
        last[:] = canvas.ids[0, first : first + length].tolist()

    started = time.perf_counter()
    texts = model.sample(prompt, length_tokens=length, temperature=0.0, rule="confidence", on_step=on_step)
    seconds = time.perf_counter() - started
    if record is not None:
        record.tokens, record.steps = token_texts(model.tokenizer, last), [at[position] for position in range(length)]
    return Answer(texts[0], length, texts.network_calls["denoising"], seconds)


def _encode(model: TextModel, prompt: str, has_chat: bool) -> list[int]:
    return model.encode_chat([{"role": "user", "content": prompt}]) if has_chat else model.encode(prompt)


def _answer(model: TextModel, ids: list[int], num_forwards: int, seconds: float) -> Answer:
    return Answer(model.decode_until_end(ids), len(ids), num_forwards, seconds)
