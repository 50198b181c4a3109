"""The engine.

Texts equal those of `TextModel` in any batch; slots are freed; the canvas is streamed; bits do not depend on the slot.
"""

from dataclasses import replace

import pytest
import torch
from helpers.jobs import finish, job

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import EngineSettings as Settings
from dlm_ray.diffusion.samplers.rules import LeftToRight
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.loading import load
from dlm_ray.serving.engine import Engine, NetworkLost
from dlm_ray.serving.jobs import TextStream

PARAMS = {
    "ar": [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}],
    "block8": [{}, {"rule": "threshold", "threshold": 0.3}, {"rule": "ancestral", "steps": 5, "remask": 0.2},
        {"rule": "margin", "top_p": 0.9}],
    "causal4": [{}, {"rule": "threshold", "threshold": 0.3}],
    "whole": [{"steps": 4}, {"rule": "threshold"}, {"rule": "ancestral", "steps": 30, "remask": 0.1},
        {"rule": "first_hitting", "temperature": 0.5}],
    "sedd": [{"steps": 6}, {"rule": "confidence", "steps": 3, "temperature": 0.0}],
}  # fmt: skip


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", PARAMS)
def test_texts_of_mixed_params_and_lengths_equal_those_of_the_sampler(runs, name, batch_invariant):
    model = load(runs / name)
    engine = Engine(model, Settings(slots=4, batch_invariant=batch_invariant))
    jobs, texts = {}, {}
    for number, options in enumerate(PARAMS[name] * 2):  # more than there are slots, and joining at different times
        asked = job(model, ["the model", "a", ""][number % 3], 9 + 4 * (number % 4), seed=number, **options)
        jobs[asked] = options
        engine.submit([asked])
        for update in engine.tick():
            texts[update.job] = texts.get(update.job, "") + update.text
        assert engine.num_active <= 4
    finish(engine, texts=texts)
    alone = {}
    for asked, options in jobs.items():
        engine.submit([asked])
        own, updates = finish(engine)
        alone[asked] = own[asked]
        assert updates[-1].finish_reason in ("length", "stop")
        prompt = model.tokenizer.decode(asked.prompt[1:])
        [expected] = model.sample(prompt, length_tokens=asked.length_tokens, seed=asked.seed, **options)
        assert alone[asked] == expected
    assert texts == alone


def test_a_cancelled_job_frees_its_slot_before_the_next_tick_and_has_no_further_updates(runs):
    for name in ("block8", "whole"):
        model = load(runs / name)
        engine = Engine(model, Settings(slots=2))
        first, second, third = (job(model, length=20, seed=seed, rule="first_hitting") for seed in range(3))
        for one in (first, second, third):
            engine.submit([one])
        engine.tick()
        assert engine.num_active == 2 and list(engine.waiting) == [third]
        engine.cancel([first])
        assert engine.num_active == 1
        engine.tick()
        assert engine.num_active == 2 and not engine.waiting
        texts, _ = finish(engine)
        assert set(texts) == {second, third}
        engine.cancel([second])  # finished already
        engine.submit([third])
        engine.cancel([third])
        assert not engine.waiting and engine.tick() == []


def test_a_deadline_ends_running_and_waiting_jobs(runs):
    model = load(runs / "block8")
    engine = Engine(model, Settings(slots=1))
    running, waiting, patient = (job(model, deadline=deadline) for deadline in (10.0, 11.0, None))
    for one in (running, waiting, patient):
        engine.submit([one])
    assert not [update for update in engine.tick(9.0) if update.finish_reason]
    assert {(update.job, update.finish_reason) for update in engine.tick(12.0)} >= {
        (running, "deadline"),
        (waiting, "deadline"),
    }
    _, updates = finish(engine, 13.0)
    [end] = [update for update in updates if update.finish_reason]
    assert end.job == patient and end.finish_reason in ("length", "stop")


def test_prompts_share_cached_prefixes_but_not_between_checkpoints(runs):
    prompt = "the model reads a row and writes what it has not seen"
    for weights in ("raw", "ema"):
        model = load(runs / "block8", weights)
        kept, nothing_kept = (Engine(model, Settings(slots=4, prefix_cache_mib=mib)) for mib in (1, 0))
        assert len(job(model, prompt).prompt) > 16
        for seed in range(3):
            asked = job(model, prompt, seed=seed)
            (text, updates), (expected, others) = (
                [engine.submit([asked]), finish(engine)][1] for engine in (kept, nothing_kept)
            )
            assert text == expected
            assert (updates[-1].num_cached_tokens > 0) == (seed > 0) and others[-1].num_cached_tokens == 0
            assert others[-1].num_cache_calls - updates[-1].num_cache_calls == (seed > 0)


@pytest.mark.parametrize("name", ["block8", "whole"])
def test_a_job_that_is_not_streamed_has_one_update_at_its_end(runs, name):
    model = load(runs / name)
    engine = Engine(model, Settings(slots=4))
    streamed = job(model, length=20, seed=5)
    engine.submit([streamed])
    whole = finish(engine)[0][streamed]
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    quiet, stopped = (
        replace(job(model, length=20, seed=5, stops=stops), is_streamed=False) for stops in ((), (middle,))
    )
    engine.submit([quiet, stopped])
    _, updates = finish(engine)
    assert {update.job: (update.text, update.finish_reason) for update in updates} == {
        quiet: (whole, "length"),
        stopped: (whole[: whole.index(middle)], "stop"),
    }
    assert len(updates) == 2


@pytest.mark.parametrize("name", ["block8", "whole"])
def test_a_text_ends_before_its_stop_text(runs, name):
    model = load(runs / name)
    engine = Engine(model, Settings(slots=2))
    plain, stopped = job(model, length=20, seed=5), None
    engine.submit([plain])
    whole = finish(engine)[0][plain]
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = job(model, length=20, seed=5, stops=(middle, "never in it"))
    engine.submit([stopped])
    texts, updates = finish(engine)
    assert texts[stopped] == whole[: whole.index(middle)]
    assert updates[-1].finish_reason == "stop"


@pytest.mark.parametrize("name", ["block8", "whole"])
def test_the_streamed_canvas_has_each_position_with_its_probability(runs, name):
    model = load(runs / name)
    engine = Engine(model, Settings(slots=2))
    shown = job(model, length=12, seed=5, stream_canvas=True, rule="first_hitting")
    engine.submit([shown])
    texts, updates = finish(engine)
    canvases = [update.canvas for update in updates if update.canvas]
    assert len(canvases) >= 10 and canvases[0]["tokens"][0:] != canvases[-1]["tokens"]
    filled = [canvas["start"] + sum(text is not None for text, _ in canvas["tokens"]) for canvas in canvases]
    assert filled == sorted(filled)  # one more a call
    for canvas in canvases:
        assert canvas["start"] + len(canvas["tokens"]) <= 12
        assert all(0 < p <= 1 if text is not None else p == 0 for text, p in canvas["tokens"])


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *[
            (name, rule)
            for name in ("block8", "whole")
            for rule in ("margin", "entropy_bounded", "threshold", "left_to_right", "confidence")
        ],
        ("sedd", "tweedie"),
        ("genmd4", "state_dependent"),
    ],
)
@torch.no_grad()
def test_the_canvas_shows_the_models_probability_of_every_token_whatever_its_rule_ranks_by(runs, name, rule):
    model = load(runs / name)
    if rule == "left_to_right":
        model.rules = (*model.rules, rule)
    engine = Engine(model, Settings(slots=2))
    shown = job(model, length=12, seed=3, stream_canvas=True, rule=rule, steps=5, temperature=0.7, top_p=0.9)
    size = shown.params.block_tokens
    engine.submit([shown])

    def state():
        """The whole row, as the network sees it, and where the part that the canvas shows begins in it."""
        [(text, ids, is_masked, _)] = engine._samplers[size].running()
        before = text.ids[: text.block_start] if size else list(shown.prompt)
        return (
            torch.tensor([*before, *ids.tolist()]),
            torch.cat([torch.zeros(len(before), dtype=torch.bool), is_masked]),
            len(before),
        )

    num_checked, before = 0, None
    never = model.forbidden_token_ids(False, ())
    while engine.num_active or engine.waiting:
        updates = engine.tick()
        if not engine.num_active:
            break
        now = state()
        canvas = updates[-1].canvas if updates else None
        if canvas and before is not None and before[2] == now[2]:
            row = before[0].masked_fill(before[1], model.denoiser.mask_id)[None]
            hidden = model.denoiser.hidden(row, Visibility("bidirectional", block_tokens=size))[0]
            logits = model.denoiser.network.get_output_embeddings()(hidden)[:, : model.denoiser.vocab_size]
            probs = logits.index_fill(1, torch.tensor(never, dtype=torch.long), float("-inf")).double().softmax(-1)
            first = len(shown.prompt) + canvas["start"]
            for place, (token, p) in enumerate(canvas["tokens"]):
                position = first + place
                if token is not None and before[1][position]:
                    assert p == pytest.approx(
                        probs[position - model.denoiser.shift, now[0][position]].item(), abs=6e-4
                    )  # shown to 3 digits
                    num_checked += 1
        before = now
    assert num_checked >= 4


def test_infilling_in_a_batch_equals_infilling_alone(runs):
    model = load(runs / "whole")
    engine = Engine(model, Settings(slots=4))
    jobs = [job(model, "the model", length, suffix=" and writes", seed=length) for length in (3, 5, 7)]
    for one in [*jobs, job(model, length=20)]:
        engine.submit([one])
    texts, _ = finish(engine)
    for one in jobs:
        assert texts[one] == model.infill("the model", " and writes", length_tokens=one.length_tokens, seed=one.seed)[0]


def test_other_block_sizes_than_the_trained_one_have_their_own_slots(runs):
    model = load(runs / "whole")
    engine = Engine(model, Settings(slots=3, block_tokens=(8,)))
    with pytest.warns(UserWarning, match="not trained for"):
        by_blocks = job(model, length=40, block_tokens=8, rule="first_hitting")
    for one in (by_blocks, job(model, length=20), job(model, length=9)):
        engine.submit([one])
    texts, updates = finish(engine)
    with pytest.warns(UserWarning, match="not trained for"):
        assert texts[by_blocks] == model.sample("the model", length_tokens=40, block_tokens=8, rule="first_hitting")[0]
    with pytest.raises(
        UserError,
        match="engine.block_tokens=5: this checkpoint is sampled in blocks whose size divides its context",
    ):
        Engine(model, Settings(block_tokens=(5,)))


def test_incomplete_characters_and_possible_stop_texts_are_held_back():
    letters = {1: b"a", 2: b"\xe2", 3: b"\x82", 4: b"\xac", 5: b"b", 6: b"c"}
    stream = TextStream(lambda ids: b"".join(letters[i] for i in ids).decode(errors="replace"), ("bcb",))
    said = [
        stream.push(ids, False) for ids in ([1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
    ]
    assert said == ["a", "", "", "\u20ac", "", ""]
    assert stream.push([1, 2, 3, 4, 5, 6, 1], False) == "bca" and not stream.is_stopped
    assert stream.push([1, 2, 3, 4, 5, 6, 1, 5, 6, 5], False) == "" and stream.is_stopped
    assert TextStream(lambda ids: "ab", ("bc",)).push([1], True) == "ab"
    # What a character without all its bytes looks like is no stop text, until it stays.
    stream = TextStream(lambda ids: b"".join(letters[i] for i in ids).decode(errors="replace"), ("\ufffd",))
    assert [stream.push(ids, False) for ids in ([1], [1, 2], [1, 2, 3, 4])] == ["a", "", "\u20ac"]
    assert stream.push([1, 2, 3, 4, 2, 5], False) == "" and stream.is_stopped


# Fault isolation


POISON = 7


def poison(monkeypatch, model, is_bad):
    """The network raises for every call that `is_bad` of its ids."""
    hidden = model.denoiser.hidden

    def poisoned(ids, *rest):
        if is_bad(ids):
            raise RuntimeError("the network fails")
        return hidden(ids, *rest)

    monkeypatch.setattr(model.denoiser, "hidden", poisoned)


def company(model, size=3):
    """Return more jobs than there are slots, some of them longer than a context of 32 where that is possible."""
    length = 22 if model.sampling_target().kind == "whole" else 45
    return [
        job(model, prompt, length - number, seed=number)
        for number, prompt in enumerate(["the model", "a", "", " and writes"][:size])
    ]


def alone(model, jobs):
    texts = {}
    for one in jobs:
        engine = Engine(model, Settings(slots=1))
        engine.submit([one])
        texts |= finish(engine)[0]
    return texts


@pytest.mark.parametrize("place", ["prompt", "end of prompt", "rule", "stop", "drawing"])
@pytest.mark.parametrize("name", ["ar", "block8", "whole"])
def test_a_failing_job_does_not_change_the_texts_of_other_jobs(runs, monkeypatch, name, place):
    model = load(runs / name)
    innocents = company(model)
    expected = alone(model, innocents)
    guilty = job(model, length=9, seed=1)  # it comes between them
    if place in (
        "prompt",
        "end of prompt",
    ):  # in a whole block of it, which is encoded when it joins; or in what is denoised with the text
        ids = [POISON] * 9 if place == "prompt" else [*range(20, 36), POISON]
        guilty = replace(guilty, prompt=[guilty.prompt[0], *ids])
        poison(monkeypatch, model, lambda ids: bool((ids == POISON).any()))
        assert not any(POISON in one.prompt for one in innocents)
    elif place == "stop":
        guilty = replace(guilty, stops=("no text",))
        monkeypatch.setattr(TextStream, "push", _refusing(TextStream.push, guilty.stops))
    else:
        own = model.rule
        broken = {"rule": BrokenRule, "drawing": LeftToRight}[place]()
        monkeypatch.setattr(model, "rule", lambda chosen: broken if chosen is guilty.params else own(chosen))
        if place == "drawing":
            guilty = replace(guilty, params=guilty.params.model_copy(update={"temperature": float("nan")}))
            monkeypatch.setattr(model, "rule", lambda chosen: broken if chosen is guilty.params else own(chosen))
    if place in ("prompt", "end of prompt"):
        texts_with_poison = [text for text in expected.values() if POISON in model.encode(text)]
        assert not texts_with_poison, "the innocents never write it"
    engine = Engine(model, Settings(slots=3))
    engine.submit([innocents[0], guilty, *innocents[1:]])
    texts, updates = finish(engine)
    failed = [update for update in updates if update.failure is not None]
    assert [update.job for update in failed] == [guilty]
    assert {one: texts[one] for one in innocents} == expected  # updates add up, so nothing was said twice either
    assert sum(update.finish_reason is not None for update in updates) == len(innocents)
    engine.submit(innocents)
    assert finish(engine)[0] == expected  # the slots are as they were


class BrokenRule(LeftToRight):
    """Works until 5 positions are left."""

    def selected(self, canvas, wanted, *rest):
        if int((canvas.is_masked & canvas.is_open).sum()) <= 5:
            raise IndexError("a rule fails")
        return super().selected(canvas, wanted, *rest)


def _refusing(push, stops):
    def refuse(self, ids, is_last):
        if self.stops == stops and len(ids) > 3:
            raise OverflowError("can't convert negative int to unsigned")
        return push(self, ids, is_last)

    return refuse


@pytest.mark.long
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", ["ar", "block8", "whole"])
def test_a_transient_failure_of_any_call_changes_no_text(runs, monkeypatch, name, batch_invariant):
    model = load(runs / name)
    settings = Settings(slots=3, batch_invariant=batch_invariant, prefix_cache_mib=0)
    jobs = company(model, 4)
    engine, calls = Engine(model, settings), []
    poison(monkeypatch, model, lambda ids: calls.append(1))
    engine.submit(jobs)
    expected, _ = finish(engine)
    num_calls = len(calls)
    for failing in range(0, num_calls, max(1, num_calls // 5)):
        calls.clear()
        monkeypatch.undo()
        poison(monkeypatch, model, lambda ids, failing=failing: calls.append(1) or len(calls) == failing + 1)
        engine.submit(jobs)
        texts, updates = finish(engine)
        assert texts == expected, f"call {failing} of {num_calls}"
        assert not any(update.failure for update in updates)


def test_a_network_that_fails_for_every_input_raises_network_lost(runs, monkeypatch):
    for name in ("block8", "whole"):
        model = load(runs / name)
        engine = Engine(model, Settings(slots=3))
        engine.submit(company(model))
        engine.tick()
        with monkeypatch.context() as patch:
            poison(patch, model, lambda ids: True)
            with pytest.raises(NetworkLost):
                finish(engine)
