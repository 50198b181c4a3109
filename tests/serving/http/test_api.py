"""The API over HTTP.

OpenAI's client as it is, streams that add up, what is refused and how, keys, limits, and whatever nonsense may come.
"""

import asyncio
import contextlib
import json
import random
import re
import time

import httpx
import openai
import pytest
from helpers.service import client, hosted, listening, until
from starlette.requests import ClientDisconnect

from dlm_ray.data.tokenizer import encode
from dlm_ray.diffusion.samplers.rules import LeftToRight
from dlm_ray.generation.loading import load


@pytest.fixture(scope="module")
def block8(runs):
    with hosted(runs / "block8", limits={"output_tokens": 60}) as (host, app):
        yield host, app


@pytest.fixture(scope="module")
def whole(runs):
    with hosted(runs / "whole", engine={"block_tokens": [8]}) as (host, app):
        yield host, app


def ask(app, *requests, headers=None):
    """Answers of (method, path, body) at once, in their order."""

    async def run():
        async with client(app, headers=headers or {}) as http:
            return await asyncio.gather(*(http.request(method, path, json=body) for method, path, body in requests))

    return asyncio.run(run())


def complete(app, **body):
    [answer] = ask(app, ("POST", "/v1/completions", {"model": "tiny", "prompt": "the model", **body}))
    return answer


def test_openais_client_completes_and_streams_what_the_sampler_writes(block8, runs):
    model = load(runs / "block8")
    [expected] = model.sample("the model", length_tokens=40, seed=4, rule="threshold", threshold=0.2)
    with listening(block8[1]) as url:
        own = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        asked = {
            "model": "tiny",
            "prompt": "the model",
            "max_tokens": 40,
            "seed": 4,
            "extra_body": {"rule": "threshold", "threshold": 0.2},
        }
        whole = own.completions.create(**asked)
        assert whole.choices[0].text == expected and whole.choices[0].finish_reason in ("length", "stop")
        assert whole.usage.prompt_tokens == len(model.encode("the model")) and whole.usage.completion_tokens <= 40
        assert whole.usage.network_calls["denoising"] > 0
        chunks = list(own.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
        assert sum(bool(chunk.choices and chunk.choices[0].text) for chunk in chunks) > 2  # block by block
        assert chunks[-1].usage == whole.usage
        assert own.models.list().data[0].id == "tiny" and own.models.retrieve("tiny").block_tokens == [8]
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            own.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
            own.completions.create(model="other", prompt="x")


def test_the_same_seed_gives_the_same_bits_alone_and_among_31_others(runs):
    with hosted(runs / "block8", engine={"slots": 32, "batch_invariant": True}) as (host, app):
        assert host.describe()["capabilities"]["batch_invariant"]
        body = {"max_tokens": 30, "seed": 7, "rule": "margin"}
        alone = complete(app, **body).json()["choices"][0]["text"]
        prompts = ["a", "the model reads a row and writes", "the model"]
        others = [
            {"model": "tiny", "prompt": prompts[i % 3], "max_tokens": 10 + i, "seed": i, "temperature": 0.1 * i}
            for i in range(31)
        ]
        asked = [*others[:15], {"model": "tiny", "prompt": "the model", **body}, *others[15:]]
        answers = ask(app, *(("POST", "/v1/completions", one) for one in asked))
        assert answers[15].json()["choices"][0]["text"] == alone
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) > 25


def test_usage_and_metrics_say_how_much_of_a_prompt_was_found(runs):
    with hosted(runs / "block8") as (_, app):
        prompt = [*range(20, 37)]  # with the start token 18: two blocks of 8, and two tokens of the next
        bodies = [
            {"prompt": prompt, "n": 2},
            {"prompt": prompt},
            {"prompt": [prompt[:8], [5], prompt]},
            {"prompt": [*prompt[:9], 1, 2, 3]},
        ]
        usages = [complete(app, **body, max_tokens=4, seed=1).json()["usage"] for body in bodies]
        assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 15, 7 + 0 + 15, 7]
        assert [usage["prompt_tokens"] for usage in usages] == [17, 17, 26, 12]
        [page] = ask(app, ("GET", "/metrics", None))
        assert (
            "dlm_ray_prompt_tokens_total 72\n" in page.text and "dlm_ray_cached_prompt_tokens_total 44\n" in page.text
        )


def test_a_chat_is_what_its_template_makes_of_it(block8):
    host, app = block8
    tokenizer = host.model.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    try:
        with listening(app) as url:
            own = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            asked = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "the model"}],
                "max_tokens": 12,
                "seed": 1,
            }
            answer = own.chat.completions.create(**asked)
            assert answer.choices[0].message.role == "assistant"
            assert (
                answer.choices[0].message.content
                == host.model.sample("user: the model\nassistant:", length_tokens=12, seed=1)[0]
            )
            deltas = [chunk.choices[0].delta for chunk in own.chat.completions.create(**asked, stream=True)]
            assert deltas[0].role == "assistant"
            assert "".join(delta.content or "" for delta in deltas) == answer.choices[0].message.content
    finally:
        tokenizer.chat_template = None


def test_every_prompt_begins_with_one_start_token_whoever_wrote_it(block8):
    """The template, as Llama's and Mistral's do; a client that sends ids; or neither."""
    host, app = block8
    model = host.model
    expected = model.sample("the model", length_tokens=12, seed=1)[0]
    start, ids = model.tokenizer_identity.start_id, model.encode("the model")
    for prompt in ("the model", ids, [start, *ids], [start, start, *ids]):
        answer = complete(app, prompt=prompt, max_tokens=12, seed=1).json()
        assert answer["choices"][0]["text"] == expected and answer["usage"]["prompt_tokens"] == len(ids)
    for template in ("{{ messages[0].content }}", "{{ bos_token }}{{ messages[0].content }}"):
        model.tokenizer.chat_template = template
        try:
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "the model"}],
                "max_tokens": 12,
                "seed": 1,
            }
            [answer] = ask(app, ("POST", "/v1/chat/completions", body))
        finally:
            model.tokenizer.chat_template = None
        assert answer.json()["choices"][0]["message"]["content"] == expected
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)


def test_a_special_token_that_a_request_spells_out_is_text_as_in_the_data(whole):
    host, app = whole
    text = "the<|endoftext|>"
    [(ids, _)] = encode(host.model.tokenizer, [text])
    assert len(ids) > 5
    for given in ({"prompt": text}, {"prompt": "", "suffix": text}):
        assert complete(app, max_tokens=2, **given).json()["usage"]["prompt_tokens"] == len(ids)
    [scored] = ask(app, ("POST", "/v1/score", {"model": "tiny", "text": text}))
    assert scored.json()["tokens"] == len(ids)
    host.model.tokenizer.chat_template = "{{ messages[0].content }}"
    try:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
        [answer] = ask(app, ("POST", "/v1/chat/completions", body))
    finally:
        host.model.tokenizer.chat_template = None
    assert answer.json()["usage"]["prompt_tokens"] == len(ids)


def test_several_prompts_and_choices_are_told_apart(block8, runs):
    answer = complete(block8[1], prompt=["the model", "a row"], n=2, max_tokens=9, seed=5).json()
    model = load(runs / "block8")
    expected = [
        text
        for prompt in ("the model", "a row")
        for text in model.sample(prompt, num_samples=2, length_tokens=9, seed=5)
    ]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    ids = model.encode("the model")
    assert complete(block8[1], prompt=ids, max_tokens=9, seed=5).json()["choices"][0]["text"] == expected[0]


def test_a_stream_shows_the_canvas_and_ends_with_what_it_showed(whole):
    body = {"max_tokens": 12, "seed": 2, "rule": "first_hitting", "stream": True, "stream_options": {"denoising": True}}
    lines = complete(whole[1], **body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line[6:]) for line in lines[:-2]]
    canvases = [chunk["dlm_ray"]["canvas"]["tokens"] for chunk in chunks if "canvas" in chunk.get("dlm_ray", {})]
    masked = [sum(text is None for text, _ in canvas) for canvas in canvases]
    assert masked == sorted(masked, reverse=True) and len(masked) >= 10
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text.startswith("".join(text for text, _ in canvases[-1][: [t for t, _ in canvases[-1]].index(None)]))


def test_infilling_chooses_among_lengths_by_the_bound(whole, block8, runs):
    model = load(runs / "whole")
    body = {"model": "tiny", "prefix": "the model", "suffix": " and writes", "seed": 3}
    [one, several, completed, refused] = [
        ask(app, ("POST", path, {**body, **more}))[0]
        for app, path, more in [
            (whole[1], "/v1/infill", {"length_tokens": 5}),
            (whole[1], "/v1/infill", {"length_tokens": [3, 5, 8]}),
            (whole[1], "/v1/completions", {"prompt": body["prefix"], "max_tokens": 5}),
            (block8[1], "/v1/infill", {"length_tokens": 5}),
        ]
    ]
    [expected] = model.infill("the model", " and writes", length_tokens=5, seed=3)
    assert one.json()["choices"][0]["text"] == expected
    assert completed.status_code == 400  # `prefix` is no field of completions
    candidates = several.json()["dlm_ray"]["candidates"]
    best = min(candidates, key=lambda candidate: candidate["bits_per_byte"])
    assert candidates[1]["text"] == expected and several.json()["choices"][0]["text"] == best["text"]
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "cannot_infill"


def test_a_score_is_the_bound_with_its_interval(whole, block8):
    for _, app in (whole, block8):
        few, many = (
            ask(app, ("POST", "/v1/score", {"model": "tiny", "text": "the model reads a row", "draws": n}))[0].json()
            for n in (8, 64)
        )
        assert few["is_bound"] and few["ci95_draws"][0] < many["bits_per_byte"] < few["ci95_draws"][1]
        assert (
            few["bytes"] == 21
            and many["ci95_draws"][1] - many["ci95_draws"][0] < few["ci95_draws"][1] - few["ci95_draws"][0]
        )


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
        ({"logprobs": 3}, "logprobs", "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty"),
        ({"tools": []}, "tools", "not supported"),
        ({"max_tokens": 61}, "max_tokens", "at most 60"),
        ({"prompt": "word " * 60}, "prompt", "tokens of prompt"),
        ({"prompt": [299999]}, "prompt", "ids are below"),
        ({"prompt": "\ud800"}, "prompt", "surrogates"),
        ({"rule": "tweedie"}, "rule", "one of confidence"),
        ({"rule": "package.module:Class"}, "rule", "a custom rule cannot be set by a request"),
        ({"top_p": 2, "threshold": 0.5}, "top_p", "less than or equal to 1"),
        ({"noise": "float32_gumbel"}, "noise", "not supported"),
        ({"steps": 2.0}, "steps", "must be a whole number"),
        ({"threshold": 0.5}, "threshold", "belongs to rule=threshold"),
        ({"steps": 5000}, "steps", "at most 1024"),
        ({"block_tokens": 4}, "block_tokens", "this service has 8"),
        ({"n": 17}, "n", "at most 16"),
        ({"suffix": "x"}, "suffix", "cannot infill"),
        ({"stream_options": {}, "stream": False}, "stream_options", "stream=true"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ],
)
def test_what_is_not_understood_is_a_400_that_names_the_field(block8, body, param, message):
    for stream in (False, True):
        asked = {"model": "tiny", "prompt": "the model", "stream": stream, **body}

        async def post(content):
            async with client(block8[1]) as http:
                return await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})

        answer = asyncio.run(post(json.dumps(asked)))
        error = answer.json()["error"]
        assert answer.status_code == 400 and answer.headers["x-request-id"].startswith("req-")
        assert (
            error["param"] == param
            and message in error["message"]
            and "--" not in error["message"]
            and error["type"] == "invalid_request_error"
        )


def test_what_asks_for_nothing_is_taken(block8):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "logit_bias": None,
    }
    assert complete(block8[1], **neutral, max_tokens=2).status_code == 200


def test_keys_sizes_and_numbers_of_requests_have_limits(runs, caplog):
    keys = ["a-first-key-of-many-letters", "the-second-key-of-as-many"]
    with hosted(
        runs / "block8",
        keys,
        capacity_texts=3,
        limits={"body_bytes": 2000, "requests_per_key": 2, "output_tokens": 4000},
    ) as (
        host,
        app,
    ):
        good = {"model": "tiny", "prompt": "a", "max_tokens": 4}
        statuses = {}
        for name, header in {
            "none": {},
            "wrong": {"authorization": "Bearer no"},
            "basic": {"authorization": keys[0]},
        }.items():
            [answer] = ask(app, ("POST", "/v1/completions", good), headers=header)
            statuses[name] = answer.status_code
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert set(statuses.values()) == {401}
        first, second = ({"authorization": f"Bearer {key}"} for key in keys)
        assert ask(app, ("GET", "/healthz", None))[0].status_code == 200
        assert ask(app, ("GET", "/metrics", None))[0].status_code == 401
        [large] = ask(app, ("POST", "/v1/completions", {**good, "prompt": "x" * 2000}), headers=first)
        assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"

        async def chunked():
            async with client(app, headers=first) as http:

                async def parts():
                    for _ in range(10):
                        yield b" " * 500

                return await http.post("/v1/completions", content=parts())

        assert asyncio.run(chunked()).status_code == 413

        async def crowd():
            async with client(app, headers=first) as mine, client(app, headers=second) as theirs:
                endless = {**good, "max_tokens": 3000, "temperature": 0}
                long = [asyncio.ensure_future(mine.post("/v1/completions", json=endless)) for _ in range(2)]
                while host.engine.num_active < 2:
                    await asyncio.sleep(0.01)
                too_many = await mine.post("/v1/completions", json=good)
                full = await theirs.post("/v1/completions", json={**good, "n": 2})
                fits = await theirs.post("/v1/completions", json=good)
                for one in long:
                    one.cancel()
                await asyncio.gather(*long, return_exceptions=True)
                return too_many, full, fits

        too_many, full, fits = asyncio.run(crowd())
        assert (too_many.status_code, full.status_code, fits.status_code) == (429, 503, 200)
        assert too_many.headers["retry-after"] == full.headers["retry-after"] == "1"
        assert until(lambda: not host.engine.num_active) < 1.0
        assert not any(key in caplog.text for key in keys)


def test_a_deadline_ends_a_request_with_an_error(block8):
    answer = complete(block8[1], max_tokens=60, timeout_seconds=0.001)
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "deadline"
    streamed = complete(block8[1], max_tokens=60, timeout_seconds=0.001, stream=True)
    assert '"code": "deadline"' in streamed.text and "[DONE]" not in streamed.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot_within_a_second(runs, stream):
    with hosted(runs / "block8", limits={"output_tokens": 100_000}) as (host, app), listening(app) as url:
        body = {
            "model": "tiny",
            "prompt": "the model",
            "max_tokens": 100_000,
            "temperature": 0,
            "stream": stream,
        }  # it has no end
        until_then = httpx.Timeout(5, read=0.3)
        with (
            pytest.raises(httpx.TimeoutException),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=until_then) as answer,
        ):
            until(lambda: host.engine.num_active == 1)
            for _ in answer.iter_raw():
                raise httpx.ReadTimeout("enough")
        assert until(lambda: host.engine.num_active == 0) < 1.0


@pytest.mark.parametrize("version", ["2.3", "2.4"])  # of ASGI: a server says it by a message, or by an error
def test_a_client_that_is_gone_before_the_first_byte_leaves_nothing_behind(block8, version):
    host, app = block8
    body = {"model": "tiny", "prompt": "the model", "max_tokens": 60, "stream": True}
    received = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

    async def receive():
        return next(received, {"type": "http.disconnect"})

    async def send(message):
        raise OSError("the client is gone")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "http_version": "1.1",
        "asgi": {"spec_version": version},
    }
    scope["headers"] = [(b"content-type", b"application/json")]
    with contextlib.suppress(ClientDisconnect, OSError, ExceptionGroup):
        asyncio.run(app(scope, receive, send))
    until(lambda: host.engine.num_active == 0)
    [metrics] = ask(app, ("GET", "/metrics", None))
    assert "dlm_ray_texts_under_way 0" in metrics.text


def test_a_tick_that_fails_is_an_error_for_those_in_it_and_nothing_for_those_behind(runs, monkeypatch):
    with hosted(runs / "block8") as (host, app):
        monkeypatch.setattr(host.engine, "tick", lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
        failed = complete(app)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert complete(app).status_code == 200


@pytest.mark.parametrize("name", ["ar", "block8", "whole"])
def test_a_temperature_that_is_almost_0_is_greedy_and_harms_nobody_beside_it(runs, name):
    with hosted(runs / name) as (_, app):
        innocent = {"model": "tiny", "prompt": "a", "max_tokens": 20, "seed": 3}
        [alone] = ask(app, ("POST", "/v1/completions", innocent))
        common = {"model": "tiny", "prompt": "the model", "max_tokens": 12}
        others = [{**common, "temperature": temperature} for temperature in (0, 5e-324, 1e-310, 2.3e-308, -0.0)]
        *answers, beside = ask(app, *(("POST", "/v1/completions", one) for one in [*others, innocent]))
        assert [answer.status_code for answer in answers] == [200] * 5
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        assert beside.json()["choices"] == alone.json()["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_is_a_500_of_its_own_and_others_are_written_to_their_end(
    runs, monkeypatch, stream, caplog
):
    with hosted(runs / "block8") as (host, app):
        innocent = {"model": "tiny", "prompt": "a", "max_tokens": 30, "seed": 3, "stream": stream}
        [alone] = ask(app, ("POST", "/v1/completions", innocent))
        own = host.model.rule
        monkeypatch.setattr(host.model, "rule", lambda chosen: Failing() if chosen.top_p == 0.5 else own(chosen))
        guilty = {"model": "tiny", "prompt": "a", "max_tokens": 30, "top_p": 0.5, "n": 2}
        answers = ask(app, *(("POST", "/v1/completions", one) for one in (innocent, guilty, innocent)))
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert texts_of(answers[0]) == texts_of(answers[2]) == texts_of(alone)
        assert re.search(r"request \S+ failed", caplog.text)
        host.check()


class Failing(LeftToRight):
    """Works until 5 positions of a block are left."""

    def selected(self, canvas, wanted, *rest):
        assert int((canvas.is_masked & canvas.is_open).sum()) > 5, "a rule fails"
        return super().selected(canvas, wanted, *rest)


def texts_of(answer):
    """Of a whole answer, or of a stream."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return [choice["text"] for choice in answer.json()["choices"]]
    *lines, done = answer.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return ["".join(choice["text"] for line in lines for choice in json.loads(line[6:])["choices"])]


def test_a_network_that_is_lost_ends_the_engine_and_nobody_waits_for_it(runs, monkeypatch):
    with hosted(runs / "block8") as (host, app):

        def dead(*_):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(host.model.denoiser, "hidden", dead)
        first = complete(app)
        until(lambda: not host._thread.is_alive())
        later, [score] = complete(app), ask(app, ("POST", "/v1/score", {"model": "tiny", "text": "the model"}))
        assert [answer.status_code for answer in (first, later, score)] == [503] * 3
        assert later.json()["error"]["code"] == "replica_lost" and later.headers["retry-after"] == "1"
        with pytest.raises(RuntimeError, match="the engine's thread has ended"):
            host.check()


@pytest.mark.parametrize("name", ["ar", "whole", "block8", "block32"])
def test_texts_of_every_length_are_scored(runs, name):
    """A block and more, whole blocks and parts of one; `tests/diffusion/test_block.py` checks the numbers by hand."""
    with hosted(runs / name) as (host, app):
        model = host.model
        ids = model.encode("Document 7: the model reads a row and writes what it has not seen because every token")
        found = {}
        for length in range(1, 18):
            text = model.tokenizer.decode(ids[:length])
            assert model.encode(text) == ids[:length]
            [answer] = ask(app, ("POST", "/v1/score", {"model": "tiny", "text": text, "draws": 64}))
            assert answer.status_code == 200 and answer.json()["tokens"] == length
            found[length] = answer.json()["nats"] / length
        # Training was short: a token is worth somewhat less than ln V = 5.7, whatever the length.
        assert all(3 < nats < 6.5 for nats in found.values()), found


def test_a_score_that_fails_fails_alone_and_one_that_nobody_waits_for_any_more_is_left_out(whole, monkeypatch):
    host, app = whole
    asked = {"model": "tiny", "text": "the model"}
    with monkeypatch.context() as patch:
        patch.setattr(host.processor, "score", lambda *_: 1 // 0)
        failed, completed = ask(
            app, ("POST", "/v1/score", asked), ("POST", "/v1/completions", {"model": "tiny", "prompt": "a"})
        )
        assert failed.status_code == 500 and "ZeroDivisionError" in failed.json()["error"]["message"]
        assert completed.status_code == 200

    async def leave():
        host._do(lambda: time.sleep(0.1))  # the engine is at something else meanwhile
        scoring = asyncio.ensure_future(host.score("the model", 64, 0))
        await asyncio.sleep(0.02)
        scoring.cancel()
        await asyncio.gather(scoring, return_exceptions=True)

    for _ in range(3):
        asyncio.run(leave())
    assert ask(app, ("POST", "/v1/score", asked))[0].status_code == 200
    host.check()


def test_what_has_no_probability_is_not_scored(whole, monkeypatch):
    host, app = whole
    for name, value, message in [
        ("encode", lambda text: [], "it has no tokens"),
        ("encode", lambda text: [5, host.model.denoiser.mask_id], "ids are below"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(host.model, name, value)
            [answer] = ask(app, ("POST", "/v1/score", {"model": "tiny", "text": "x"}))
            assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    with monkeypatch.context() as patch:
        patch.setattr(host.model.denoiser, "mask_id", host.model.encode("a")[0])  # of a checkpoint that reuses one
        [answer] = ask(app, ("POST", "/v1/score", {"model": "tiny", "text": "a row"}))
        assert answer.status_code == 400 and "the mask token" in answer.json()["error"]["message"]


def test_lengths_whose_text_cannot_be_scored_are_chosen_last(runs):
    with hosted(runs / "whole", limits={"score_draws": 4}) as (_, app):
        # A text without a suffix may end at once, and one of incomplete characters is more tokens when it is read
        # again.
        empty = {"model": "tiny", "prefix": "", "suffix": ""}
        answers = ask(
            app, *(("POST", "/v1/infill", {**empty, "seed": seed, "length_tokens": [1, 31, 30]}) for seed in range(8))
        )
        values = []
        for answer in answers:
            assert answer.status_code == 200, answer.text
            candidates = answer.json()["dlm_ray"]["candidates"]
            scored = [one["bits_per_byte"] for one in candidates if one["bits_per_byte"] is not None]
            chosen = next(
                one for one in candidates if one["length_tokens"] == answer.json()["dlm_ray"]["length_tokens"]
            )
            assert chosen["bits_per_byte"] == (min(scored) if scored else None)
            values += [one["bits_per_byte"] for one in candidates]
        assert None in values and any(values)


def nonsense(schema, document, chance):
    """A value that a schema allows, or almost: somewhere in it is what it does not allow."""
    wrong = [
        None,
        True,
        -1,
        0,
        1e308,
        -(2**63),
        2**64,
        "",
        "\x00",
        "\ud800",
        "ÿ" * 300,
        [],
        {},
        [[]],
        [None] * 5,
        {"a": {"b": []}},
        0.5,
        "NaN",
    ]
    if chance.random() < 0.15:
        return chance.choice(wrong)
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return nonsense(chance.choice(schema["anyOf"]), document, chance)
    if "enum" in schema or "const" in schema:
        return chance.choice([*schema.get("enum", [schema.get("const")]), "other"])
    kind = schema.get("type")
    if kind == "object":
        made = {
            name: nonsense(own, document, chance)
            for name, own in schema.get("properties", {}).items()
            if name in schema.get("required", ()) or chance.random() < 0.2
        }
        for gone in [name for name in made if chance.random() < 0.05]:
            del made[gone]
        return {**made, **({"x" * chance.randint(0, 9): 1} if chance.random() < 0.1 else {})}
    if kind == "array":
        return [nonsense(schema.get("items", {}), document, chance) for _ in range(chance.choice([0, 1, 1, 2, 3, 40]))]
    if kind == "integer":
        return chance.choice([schema.get("minimum", 0), schema.get("maximum", 9), 1, 2, 3, 10**25])
    if kind == "number":
        return chance.choice([schema.get("minimum", 0), schema.get("maximum", 1), 0.5, 1, -0.0, 1e-320, 1e400])
    return {"boolean": chance.random() < 0.5, "null": None}.get(
        kind, chance.choice(["tiny", "the model", "", "ab" * 50, "\ufffd\u202e"])
    )


@pytest.mark.long
def test_a_thousand_malformed_requests_are_never_a_500_and_never_a_hang(runs):
    limits = {"output_tokens": 24, "steps": 32, "choices": 4, "score_draws": 8}
    with hosted(runs / "whole", engine={"deadline_seconds": 5.0, "block_tokens": [8]}, limits=limits) as (host, app):
        [document] = [answer.json() for answer in ask(app, ("GET", "/openapi.json", None))]
        posts = {
            path: own["post"]["requestBody"]["content"]["application/json"]["schema"]
            for path, own in document["paths"].items()
            if "post" in own
        }
        assert len(posts) == 4
        chance = random.Random(5)
        broken = [
            b"",
            b"{",
            b"[" * 5000,
            b'{"model": ' + b"9" * 5000 + b"}",
            b"\xff\xfe",
            b'{"model": NaN}',
            b"null",
            b'"x"',
            b"[1]",
        ]

        async def one(http, number):
            path = chance.choice(list(posts))
            body = nonsense(posts[path], document, chance)
            if isinstance(body, dict) and chance.random() < 0.8:
                body["model"] = "tiny"
            content = chance.choice(broken) if number % 12 == 0 else json.dumps(body).encode()
            method = chance.choice(["PUT", "GET", "DELETE"]) if number % 40 == 1 else "POST"
            kind = "text/plain" if number % 30 == 2 else "application/json"
            path += chance.choice(["", "", "", "", "", "", "", "/", "/../x", "?a=1", "%00"]) if number % 9 == 3 else ""
            async with asyncio.timeout(30):
                answer = await http.request(method, path, content=content, headers={"content-type": kind})
            if answer.status_code >= 400 and answer.status_code != 307:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            return answer.status_code

        async def all_of_them():
            async with client(app) as http:
                found = []
                for start in range(0, 1000, 20):
                    found += await asyncio.gather(*(one(http, number) for number in range(start, start + 20)))
                return found

        started = time.monotonic()
        statuses = asyncio.run(all_of_them())
        assert len(statuses) == 1000 and time.monotonic() - started < 200
        assert set(statuses) <= {200, 307, 400, 404, 405, 408, 422}, sorted(set(statuses))
        assert statuses.count(400) > 500
        until(lambda: not host.engine.num_active and not host.engine.waiting)
        assert complete(app, max_tokens=5).status_code == 200
