"""The block sampler against recomputation without a cache, single requests, and autoregressive decoding by hand."""

import math

import numpy as np
import pytest
import torch
from helpers.networks import LENGTH, RULES, VOCAB, build, denoiser_of, stock
from helpers.recomputing import Recomputing

from dlm_ray.config.recipe import FAMILIES
from dlm_ray.diffusion.draws import SAMPLING, generator
from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.generate import generate_blocks
from dlm_ray.diffusion.samplers.requests import Request, Stops, unigram_entropy_nats
from dlm_ray.diffusion.samplers.rules import (
    Ancestral,
    Confidence,
    FirstHitting,
    LeftToRight,
    Threshold,
)
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility


def requests_of(lengths, **options):
    random = np.random.default_rng(5)
    prompts = [[0, *random.integers(1, VOCAB, n - 1).tolist()] for n, _ in lengths]
    return [
        Request(prompt, length, number=i, seed=3, **options)
        for i, (prompt, (_, length)) in enumerate(zip(prompts, lengths, strict=True))
    ]


def ids_of(written):
    return [text.ids for text in written.texts]


UNEQUAL = [(1, 9), (5, 7), (4, 8), (9, 3), (2, 17), (11, 6), (8, 1), (6, 12)]


@pytest.mark.parametrize("block_tokens", [1, 2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_block_size_samples_the_same_tokens_with_and_without_a_cache(family, block_tokens):
    denoiser = denoiser_of(family, shift=block_tokens != 2)
    options = {"block_tokens": block_tokens, "context_tokens": LENGTH, "num_steps": 4, "top_p": 0.9, "temperature": 0.8}
    for length in (10, 40):  # 40: beyond the context
        requests = requests_of([(3, length), (9, length - 3)])
        cached = generate_blocks(denoiser, requests, Ancestral(Polynomial()), **options)
        assert ids_of(cached) == ids_of(
            generate_blocks(Recomputing(denoiser), requests, Ancestral(Polynomial()), **options)
        )


@pytest.mark.parametrize("rule", ["first_hitting", "ancestral", "threshold"])
def test_a_batch_of_8_unequal_prompts_equals_8_single_runs(rule):
    denoiser = denoiser_of("qwen2")
    options = {"block_tokens": 4, "context_tokens": LENGTH, "num_steps": 5}
    requests = requests_of([(n, length + 20 * (i % 2)) for i, (n, length) in enumerate(UNEQUAL)])
    together = generate_blocks(denoiser, requests, RULES[rule], **options)
    alone = [generate_blocks(denoiser, [request], RULES[rule], **options).texts[0] for request in requests]
    assert ids_of(together) == [text.ids for text in alone]
    for one, other in zip(together.texts, alone, strict=True):
        assert (one.num_denoising_calls, one.num_cache_calls) == (other.num_denoising_calls, other.num_cache_calls)
    # A batch needs as many calls as its longest sequences, not the sum.
    total = together.num_denoising_calls + together.num_cache_calls
    assert total < sum(text.num_denoising_calls + text.num_cache_calls for text in alone) / 3


@torch.no_grad()
def test_requests_can_be_added_while_others_run():
    denoiser = denoiser_of("mistral")
    requests = requests_of(UNEQUAL)
    sampler = BlockSampler(denoiser, FirstHitting(), block_tokens=4, capacity_tokens=LENGTH, num_slots=3, num_steps=1)
    waiting = list(requests)
    while waiting or sampler.num_active:
        if waiting and sampler.num_active < 3:
            sampler.add([waiting.pop(0)])
        sampler.tick()
    ids = {written.request.number: written.ids for written in sampler.finished}
    alone = generate_blocks(denoiser, requests, FirstHitting(), block_tokens=4, context_tokens=LENGTH, num_steps=1)
    assert [ids[request.number] for request in requests] == ids_of(alone)


@torch.no_grad()
@pytest.mark.parametrize("mask_id", [None, VOCAB])
def test_blocks_of_one_token_with_shift_are_autoregressive_decoding(mask_id):
    """Equals transformers' full forward with the same uniform numbers, with one call per token and one per prompt."""
    denoiser, config = build("llama", mask_id=mask_id)
    denoiser = denoiser.double()
    model = stock(denoiser, config).double()
    model.load_state_dict(denoiser.network.state_dict())
    num_words = VOCAB if mask_id is not None else VOCAB + 1
    ids, seed, number = [0, 7, 11], 3, 5
    for position in range(3, 15):
        probs = model(torch.tensor([ids])).logits[0, -1, :num_words].softmax(-1)
        uniform = generator(seed, SAMPLING, position, number).random()
        ids.append(int((probs.cumsum(0) / probs.sum() <= uniform).sum()))
    written = generate_blocks(
        denoiser,
        [Request(ids[:3], 12, number, seed)],
        LeftToRight(),
        block_tokens=1,
        context_tokens=LENGTH,
        num_steps=1,
    )
    assert written.texts[0].ids == ids[3:]
    assert (written.num_denoising_calls, written.num_cache_calls) == (0, 12)


@pytest.mark.parametrize("shift", [False, True])
def test_first_hitting_calls_the_network_once_per_token(shift):
    """With shift, the position before a block predicts its first position without a call over the block.

    If that position is revealed first, the block before it is committed by a call of its own.
    """
    [request] = requests_of([(4, 16)])
    options = {"block_tokens": 4, "context_tokens": LENGTH, "num_steps": 1}
    [text] = generate_blocks(denoiser_of("gpt2", shift), [request], FirstHitting(), **options).texts
    first = [generator(request.seed, SAMPLING, block, 0).random((2, 4))[1].argmax() for block in range(1, 5)]
    num_alone = shift * sum(position == 0 for position in first[1:])
    assert text.num_denoising_calls == 16 - 4 * shift
    assert text.num_cache_calls == 1 + num_alone  # the prompt's call, and none for the last block
    assert 0 < num_alone < 3 or not shift


def test_cached_ancestral_sampling_calls_the_network_only_for_steps_that_reveal():
    """The expected calls per block are T (1 - (1 - 1/T)^K): the steps that reveal one of K tokens (BD3-LM's code)."""
    block_tokens, num_steps, num_blocks = 4, 7, 240
    requests = [Request([0] * block_tokens, block_tokens * 4, number, 1) for number in range(num_blocks // 4)]
    sampler = {"block_tokens": block_tokens, "context_tokens": LENGTH, "num_steps": num_steps}
    written = generate_blocks(denoiser_of("gpt2", shift=False), requests, Ancestral(Polynomial()), **sampler)
    calls = sum(text.num_denoising_calls for text in written.texts)
    p = 1 - (1 - 1 / num_steps) ** block_tokens
    # Steps exclude each other, so that the variance is below that of independent ones.
    assert abs(calls - num_blocks * num_steps * p) < 4.5 * math.sqrt(num_blocks * num_steps * p * (1 - p))
    many = generate_blocks(
        denoiser_of("gpt2", shift=False), requests[:1], Ancestral(Polynomial()), **{**sampler, "num_steps": 3000}
    )
    assert (
        15 <= many.texts[0].num_denoising_calls <= 16
    )  # one token per call except for coincidences, and no calls for the other steps


def test_threshold_1_equals_confidence_with_one_token_per_call():
    denoiser = denoiser_of("mistral")
    options = {"block_tokens": 8, "context_tokens": LENGTH, "num_steps": 8, "temperature": 0.0}
    one = generate_blocks(denoiser, requests_of([(8, 16)]), Threshold(1.0), **options)
    other = generate_blocks(denoiser, requests_of([(8, 16)]), Confidence(Polynomial()), **options)
    assert ids_of(one) == ids_of(other) and one.num_denoising_calls == other.num_denoising_calls
    # 16 tokens, two of which are first in their block: if only those are masked, no call is needed to predict them.
    assert 14 <= one.num_denoising_calls <= 16
    quick = generate_blocks(denoiser, requests_of([(8, 16)]), Threshold(0.05), **options)
    assert quick.num_denoising_calls < one.num_denoising_calls


def test_partial_prompt_blocks_are_kept_and_blocks_begin_at_multiples_of_their_size():
    seen = []
    request = requests_of([(6, 7)])
    options = {"block_tokens": 4, "context_tokens": LENGTH, "num_steps": 4}
    generate_blocks(
        denoiser_of("llama"),
        request,
        Threshold(1.0),
        on_step=lambda done, blocks, canvas: seen.append((done, blocks, canvas)),
        **options,
    )
    first = [canvas for done, _, canvas in seen if done == 0]
    assert all(canvas.ids[0, :2].tolist() == request[0].prompt[4:] for canvas in first)
    assert all(canvas.is_open[0].tolist() == [False, False, True, True] for canvas in first)
    assert seen[-1][:2] == (3, 3)  # 13 positions: the prompt's block, and three that are denoised


def test_beyond_the_context_the_last_half_is_encoded_again_after_a_start_token(monkeypatch):
    denoiser, passes = denoiser_of("llama"), []
    run = denoiser.hidden
    monkeypatch.setattr(
        denoiser,
        "hidden",
        lambda ids, *others: passes.append((ids.tolist(), others[1].lengths[:1])) or run(ids, *others),
    )
    options = {"block_tokens": 8, "context_tokens": LENGTH, "num_steps": 1}
    [text] = generate_blocks(denoiser, [Request([9, 1, 2], 5 * LENGTH, 0, 1)], FirstHitting(), **options).texts
    ids = [9, 1, 2, *text.ids]
    assert len(text.ids) == 5 * LENGTH
    clean = [(row[0], length) for row, [length] in passes if denoiser.mask_id not in row[0]]
    # 24 positions: two blocks, then the last half of the context with a third that fills it, and so on.
    expected = [
        (ids[0:8], 0),
        (ids[8:16], 8),
        ([9, *ids[17:24]], 0),
        (ids[24:32], 8),
        ([9, *ids[33:40]], 0),
    ]
    assert clean[: len(expected)] == expected
    assert text.num_denoising_calls + text.num_cache_calls == len(passes)


@torch.no_grad()
@pytest.mark.parametrize("shift", [True, False])
def test_first_hitting_matches_manual_computation(shift):
    """Reveal the masked position with the largest number, block by block, without a cache or a sampler."""
    denoiser, block, num_blocks, seed, number = denoiser_of("qwen3", shift), 4, 4, 8, 2
    visibility = Visibility("bidirectional", block_tokens=block)
    ids = [0, 3]
    for start in range(0, num_blocks * block, block):
        ids += [denoiser.mask_id] * (start + block - len(ids))
        random = generator(seed, SAMPLING, start // block, number)
        while denoiser.mask_id in ids:
            for_tokens, for_positions = random.random((2, block))
            position = max(
                (n for n in range(start, start + block) if ids[n] == denoiser.mask_id),
                key=lambda n: for_positions[n - start],
            )
            row = denoiser.hidden(torch.tensor([ids]), visibility)[0, position - shift]
            probs = denoiser.reduce_logits(row[None], lambda logits: logits.double().softmax(-1))[0]
            ids[position] = int((probs.cumsum(0) / probs.sum() <= for_tokens[position - start]).sum())
    options = {"block_tokens": block, "context_tokens": LENGTH, "num_steps": 1}
    assert (
        generate_blocks(denoiser, [Request(ids[:2], 14, number, seed)], FirstHitting(), **options).texts[0].ids
        == ids[2:]
    )


def test_stop_conditions_are_independent_per_sequence_and_off_by_default():
    denoiser = denoiser_of("llama")
    options = {"block_tokens": 4, "context_tokens": LENGTH, "num_steps": 1}
    free = ids_of(generate_blocks(denoiser, requests_of(UNEQUAL), FirstHitting(), **options))
    end = free[4][5]
    stopped = generate_blocks(denoiser, requests_of(UNEQUAL, stops=Stops(end_id=end)), FirstHitting(), **options)
    for text, ids in zip(stopped.texts, free, strict=True):
        expected = ids[: ids.index(end) + 1] if end in ids else ids
        assert (text.ids, text.stopped_by) == (expected, "end" if end in ids else "length")
    assert {text.stopped_by for text in stopped.texts} == {"end", "length"}


def test_a_sequence_of_low_entropy_stops_and_drops_its_last_256_tokens():
    denoiser = denoiser_of("gpt2")
    options = {"block_tokens": 8, "context_tokens": LENGTH, "num_steps": 1, "temperature": 0.0}

    def few(logits, rows, positions):
        """Restrict request 1 to two tokens; leave request 0 unchanged."""
        return torch.where((rows == 1)[:, None] & (torch.arange(logits.shape[1]) > 1), float("-inf"), logits)

    requests = [Request([0] * 9, 300, number, 1, Stops(lowest_entropy_nats=1.0)) for number in (0, 1)]
    varied, dull = generate_blocks(
        denoiser, requests, FirstHitting(), **{**options, "temperature": 1.0}, adjust=few
    ).texts
    assert (dull.stopped_by, len(dull.ids)) == ("entropy", 263 - 256)  # checked at position 272 for the first time
    assert (varied.stopped_by, len(varied.ids)) == ("length", 300)
    assert unigram_entropy_nats([1, 1, 2, 2]) == pytest.approx(math.log(2))
    assert unigram_entropy_nats(list(range(256))) == pytest.approx(math.log(256))


def test_the_reward_selects_among_the_candidates_of_a_block():
    denoiser = denoiser_of("llama")
    options = {"block_tokens": 4, "context_tokens": LENGTH, "num_steps": 1}
    seen = []

    def even(ids):
        seen.append(len(ids))
        return sum(word % 2 == 0 for word in ids)

    common = {"number": 0, "seed": 2, "candidates": 4}
    best = Request([0, 5], 14, **common, reward=even, reward_temperature=0.0)
    other = Request([0, 5], 14, number=1, seed=2)
    written = generate_blocks(denoiser, [best, other], FirstHitting(), **options)
    assert sorted(set(seen)) == [4, 8, 12, 16] and len(seen) == 16
    assert written.texts[1].ids == generate_blocks(denoiser, [other], FirstHitting(), **options).texts[0].ids
    alone = generate_blocks(denoiser, [Request([0, 5], 14, number=0, seed=2)], FirstHitting(), **options).texts[0]
    assert even(written.texts[0].ids) > even(alone.ids)
    # One of four is kept with probability softmax(reward / temperature).
    counts = np.zeros(4)
    for number in range(400):
        request = Request([0], 1, number, reward=lambda ids: float(ids[0]), reward_temperature=2.0)
        counts[request.choose(0, [[0], [1], [2], [3]])] += 1
    expected = np.exp(np.arange(4) / 2) / np.exp(np.arange(4) / 2).sum() * 400
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, 0.999


def test_candidates_are_the_same_with_and_without_a_cache():
    denoiser = denoiser_of("gpt2")
    options = {"block_tokens": 4, "context_tokens": LENGTH, "num_steps": 6}
    requests = requests_of([(3, 30), (6, 9)], candidates=3, reward=lambda ids: float(sum(ids)), reward_temperature=50.0)
    one = generate_blocks(denoiser, requests, Ancestral(Polynomial()), **options)
    other = generate_blocks(Recomputing(denoiser), requests, Ancestral(Polynomial()), **options)
    assert ids_of(one) == ids_of(other)


def test_only_committed_blocks_stay_in_the_cache():
    denoiser = denoiser_of("llama")
    visibility = Visibility("bidirectional", block_tokens=4)
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = denoiser.new_cache(3, 12)
    clean = denoiser.hidden(ids, visibility)
    first = denoiser.hidden(ids[:, :4], visibility, cache)
    cache.commit(0, 4, first[0, -1])  # slot 1 has nothing committed
    assert cache.lengths == [4, 0, 0] and torch.equal(cache.last_rows[0], first[0, -1])
    mixed = torch.stack([ids[0, 4:8], ids[1, :4]])
    for _ in range(2):  # an uncommitted pass does not affect the next one
        noise = torch.full_like(mixed, VOCAB)
        denoiser.hidden(noise, visibility, cache)
        both = denoiser.hidden(mixed, visibility, cache)
        assert torch.allclose(both[0], clean[0, 4:8], atol=1e-12) and torch.allclose(both[1], clean[1, :4], atol=1e-12)
    cache.commit(1, 4, both[1, -1])
    cache.commit(0, 4, both[0, -1])
    cache.fork(0, 2)
    assert cache.lengths == [8, 4, 8] and torch.equal(cache.last_rows[2], cache.last_rows[0])
    part = denoiser.hidden(ids[:1, 8:], visibility, cache.slot_range(2, 1))
    assert torch.allclose(part[0], clean[0, 8:], atol=1e-12)
    cache.release(0)
    assert cache.lengths == [0, 4, 8]
    assert torch.allclose(denoiser.hidden(ids[:1, :4], visibility, cache)[0], clean[0, :4], atol=1e-12)
    with pytest.raises(AssertionError, match="in a cache of 12"):
        denoiser.hidden(ids[:, :8].repeat(2, 1)[:3], visibility, cache)
