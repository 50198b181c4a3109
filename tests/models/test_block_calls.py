"""The network calls of block sampling: at most one per token, and the texts of two passes per block without a cache."""

import numpy as np
import pytest
import torch
from helpers.networks import LENGTH, RULES, VOCAB, build, denoiser_of
from helpers.two_passes import two_passes

from dlm_ray.diffusion.samplers.adjust import banned, chained, forced
from dlm_ray.diffusion.samplers.blocks import BlockSampler, num_lookahead_rows
from dlm_ray.diffusion.samplers.generate import generate_blocks
from dlm_ray.diffusion.samplers.requests import Request, Stops
from dlm_ray.diffusion.samplers.rules import Confidence, LeftToRight, Threshold
from dlm_ray.diffusion.schedules import Polynomial

SHAPES = pytest.mark.parametrize(
    ("block_tokens", "shift"), [(K, shift) for K in (1, 2, 4, 8) for shift in (True, False)]
)
ALL_RULES = {**RULES, "left_to_right": LeftToRight()}
SAMPLED, GREEDY = {"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.0}
# A rule of every kind for every size of blocks, and all rules for blocks of 4.
CASES = pytest.mark.parametrize(
    ("rule", "block_tokens", "shift"),
    [
        (rule, block_tokens, shift)
        for block_tokens, rules in {
            1: ("ancestral", "left_to_right"),
            2: ("ancestral", "confidence", "threshold", "left_to_right"),
            4: (*RULES, "left_to_right"),
            8: ("remasking", "confidence", "threshold", "first_hitting"),
        }.items()
        for rule in rules
        for shift in (True, False)
    ],
)
# Lengths of prompt and text: prompts of the start token only, that end within a block, and at its end; and a text
# beyond the context.
SHORT, LONG = [(1, 9), (8, 7)], [(6, 22)]


def requests_of(lengths, **options):
    random = np.random.default_rng(5)
    return [
        Request([0, *random.integers(1, VOCAB, num_given - 1).tolist()], length, number=number, seed=3, **options)
        for number, (num_given, length) in enumerate(lengths)
    ]


def options_of(rule, block_tokens, **more):
    num_steps = 5 if rule in ("ancestral", "remasking") else block_tokens
    return {"block_tokens": block_tokens, "context_tokens": LENGTH, "num_steps": num_steps, **more}


def check(denoiser, requests, rule, options):
    """Compare a batch with the oracle, text by text; return the outputs of both."""
    outputs = generate_blocks(denoiser, requests, rule, **options).texts
    expected = [two_passes(denoiser, request, rule, **options, shift=denoiser.shift) for request in requests]
    for output, other in zip(outputs, expected, strict=True):
        assert (output.ids, output.stopped_by) == (other.ids, other.stopped_by)
        assert output.num_denoising_calls == other.num_denoising
        assert output.num_cache_calls == other.num_encoding + other.num_committing - other.num_shared
    return outputs, expected


@CASES
def test_texts_equal_those_of_two_passes_per_block_with_fewer_calls(rule, block_tokens, shift):
    denoiser = denoiser_of("llama", shift)
    for lengths, more in ((SHORT, SAMPLED), (LONG, GREEDY)):
        outputs, expected = check(
            denoiser, requests_of(lengths), ALL_RULES[rule], options_of(rule, block_tokens, **more)
        )
    total = sum(output.num_denoising_calls + output.num_cache_calls for output in outputs)
    assert total < sum(other.num_calls for other in expected)


@SHAPES
def test_a_causal_context_stays_causal_when_blocks_are_committed(block_tokens, shift):
    denoiser = denoiser_of("qwen3", shift)
    for lengths, more in ((SHORT, SAMPLED), (LONG, GREEDY)):
        requests, options = requests_of(lengths), options_of("threshold", block_tokens, **more)
        outputs, _ = check(denoiser, requests, Threshold(0.3), {**options, "is_context_causal": True})
        if lengths is LONG and block_tokens > 2:
            others = generate_blocks(denoiser, requests, Threshold(0.3), **options).texts
            assert [output.ids for output in outputs] != [other.ids for other in others]


@SHAPES
def test_banned_and_forced_tokens_and_stops_are_those_of_two_passes_per_block(block_tokens, shift):
    denoiser = denoiser_of("qwen2", shift)
    adjust = chained(banned([3, 5, 8, 13, 21]), forced({7: 5, 9: 17, 14: 3}))
    options = options_of("threshold", block_tokens, adjust=adjust)
    free, _ = check(denoiser, requests_of([(3, 18)]), Threshold(0.3), options)
    assert [free[0].ids[position - 3] for position in (7, 9, 14)] == [5, 17, 3]
    requests = requests_of([(3, 18), (5, 9)], stops=Stops(end_id=free[0].ids[8]))
    outputs, _ = check(denoiser, requests, Threshold(0.3), options)
    assert outputs[0].stopped_by == "end" and len(outputs[0].ids) <= 9


@SHAPES
def test_one_token_per_step_takes_at_most_one_call_per_token(block_tokens, shift):
    """Beside the prompt's; less with every token that a threshold accepts."""
    num_tokens = LENGTH - 8  # within the context
    calls = {}
    for name, rule in [
        ("one", Confidence(Polynomial())),
        ("one of threshold", Threshold(1.0)),
        ("all", Threshold(0.0)),
    ]:
        request = Request([0] * 8, num_tokens, seed=1)
        [text] = generate_blocks(denoiser_of("gpt2", shift), [request], rule, **options_of(name, block_tokens)).texts
        calls[name] = text.num_denoising_calls + text.num_cache_calls - 1
    assert calls["one"] <= num_tokens and calls["one of threshold"] <= num_tokens
    assert calls["all"] == num_tokens // block_tokens - (block_tokens == 1 and shift)


@torch.no_grad()
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_the_counted_calls_are_the_calls_of_the_network(fixed_shapes, monkeypatch):
    """With requests that join while others run, and that are at different steps."""
    denoiser, calls = denoiser_of("mistral"), []
    run = denoiser.hidden
    monkeypatch.setattr(denoiser, "hidden", lambda ids, *others: calls.append(ids.shape) or run(ids, *others))
    sampler = BlockSampler(
        denoiser,
        Threshold(0.3),
        block_tokens=4,
        capacity_tokens=LENGTH,
        num_slots=3,
        num_steps=1,
        fixed_shapes=fixed_shapes,
    )
    waiting = requests_of([(1, 9), (5, 30), (4, 12), (6, 13), (9, 11)])
    while waiting or sampler.num_active:
        if waiting and sampler.num_active < 3:
            sampler.add([waiting.pop(0)])
        sampler.tick()
    assert len(calls) == sampler.num_denoising_calls + sampler.num_cache_calls
    if fixed_shapes:
        rows = 3 + num_lookahead_rows(denoiser, 3, 4)
        assert {shape for shape in calls if shape[0] > 1} == {(rows, 4)}


@torch.no_grad()
@pytest.mark.parametrize("shift", [True, False])
def test_with_fixed_shapes_the_bits_are_the_same_if_a_block_is_committed_by_a_call_of_its_own(shift):
    """In float32: 4 slots finish their blocks in the same calls, which have a row for one next block."""
    denoiser = build("llama", shift=shift)[0].requires_grad_(False)
    prompt, last = [0, 5, 6, 7], 3

    def write(numbers):
        """Return the logits of the last request by position, and its number of calls."""
        logits = {}

        def look(values, rows, positions):
            for row, position, value in zip(rows.tolist(), positions.tolist(), values, strict=True):
                if row == last:
                    logits.setdefault(position, []).append(value)
            return values

        sampler = BlockSampler(
            denoiser,
            Confidence(Polynomial()),
            block_tokens=4,
            capacity_tokens=LENGTH,
            num_slots=4,
            num_steps=4,
            adjust=look,
            fixed_shapes=True,
        )
        sampler.add([Request(prompt, 16, number, 3) for number in numbers])
        while sampler.num_active:
            sampler.tick()
        [text] = [text for text in sampler.finished if text.request.number == last]
        return logits, text.num_denoising_calls + text.num_cache_calls

    (alone, few), (together, more) = write([last]), write([0, 1, 2, last])
    assert few <= 1 + 16 and more > few
    assert alone.keys() == together.keys() == set(range(4, 20))
    for position, values in alone.items():
        assert torch.equal(torch.stack(values), torch.stack(together[position]))


def test_logits_in_float32_are_those_of_two_passes_per_block():
    denoiser = build("llama", shift=True)[0].requires_grad_(False)
    steps = []

    def look(logits, rows, positions):
        steps.append(logits)
        return logits

    options = options_of("confidence", 4, adjust=look)
    [request] = requests_of([(6, 15)])
    [output] = generate_blocks(denoiser, [request], Confidence(Polynomial()), **options).texts
    cached = list(steps)
    expected = two_passes(denoiser, request, Confidence(Polynomial()), **options)
    assert output.ids == expected.ids and len(cached) == len(expected.logits) == 18
    for one, other in zip(cached, expected.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=0)
