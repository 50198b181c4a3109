"""Whatever one request carries, the requests beside it come out as they do alone: every numeric field at its extremes,
every length of a text.

The cases are made from the schemas, so a new field is in them. Calls have fixed shapes here, so "as alone" means
bit for bit.
"""

import asyncio
import itertools
import json
import math
import random
import sys
import time

import pytest
from helpers.service import client, hosted, until

from dlm_ray.config.errors import UserError
from dlm_ray.config.sampling import RULE_OF
from dlm_ray.config.server import Server
from dlm_ray.serving.http.protocol import Chat, Completion, Infill, Score
from dlm_ray.serving.worker import EngineWorker

pytestmark = pytest.mark.long

KINDS = ("ar", "whole", "block8", "block32", "sedd", "genmd4")
BLOCK = 8
PARTS = {
    "engine": {"slots": 16, "batch_invariant": True, "deadline_seconds": 30.0},
    "limits": {"output_tokens": 24, "choices": 4, "score_draws": 16},
}
WORDS = "Document 7: the model reads a row and writes what it has not seen because every token may be masked"
STRANGE = ["", " ", "\x00", "\ufffd", "e\u0301", "\U0001f642", "\u202e", "<|endoftext|>", "a" * 40]


def numeric_fields(model):
    """Name -> schemas of the numbers that a field may be."""
    found = {}
    for name, schema in model.model_json_schema()["properties"].items():
        numbers = [one for one in schema.get("anyOf", [schema]) if one.get("type") in ("number", "integer")]
        if numbers:
            found[name] = numbers
    return found


def extremes(schema):
    """The smallest and largest value that passes and the next that does not, both zeros, 1 and its neighbours,
    subnormal and tiny numbers.
    """
    least, most = (
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum", schema.get("exclusiveMaximum")),
    )
    if schema["type"] == "integer":
        ends = [end + more for end in (least, most) if end is not None for more in (-1, 0, 1)]
        return list(dict.fromkeys([*ends, 0, 1, 2, 3, 2**63 - 1, 10**400]))
    largest = sys.float_info.max
    ends = [
        near
        for end in (least, most)
        if end is not None
        for near in (math.nextafter(end, -math.inf), end, math.nextafter(end, math.inf))
    ]
    usual = [
        -0.0,
        0.0,
        5e-324,
        1e-310,
        sys.float_info.min,
        1e-300,
        math.nextafter(1.0, 0.0),
        1.0,
        math.nextafter(1.0, 2.0),
        1e300,
        largest,
    ]
    return list(dict.fromkeys(map(repr, [*ends, *usual])))  # -0.0 is 0.0 for a dict, and its text is not


def number(value):
    return float(value) if isinstance(value, str) else value


class Cases:
    """Requests to one kind of checkpoint."""

    def __init__(self, host, seed):
        self.chance = random.Random(seed)
        self.model, self.rules, self.can_infill = (
            host.model,
            list(host.model.rules),
            host.describe()["capabilities"]["infill"],
        )
        self.ids = self.model.encode(WORDS)
        self.base = {
            "/v1/completions": {"prompt": "the model", "max_tokens": 9, "seed": 1},
            "/v1/score": {"text": "the model", "draws": 4},
        }
        if self.can_infill:
            self.base["/v1/infill"] = {"prefix": "the", "suffix": " row", "length_tokens": 4, "seed": 1}
        self.model.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        self.base["/v1/chat/completions"] = {"messages": [{"role": "user", "content": "a"}], "seed": 1}
        self.schemas = {
            "/v1/completions": Completion,
            "/v1/score": Score,
            "/v1/infill": Infill,
            "/v1/chat/completions": Chat,
        }

    def of_length(self, length):
        """A text of so many tokens."""
        text = self.model.tokenizer.decode(self.ids[:length])
        assert len(self.model.encode(text)) == length
        return text

    def one_by_one(self):
        """Every numeric field at every extreme, and every length of a text up to two blocks and one token, in a new
        order.
        """
        found = []
        for path, base in self.base.items():
            for name, schemas in numeric_fields(self.schemas[path]).items():
                for value in itertools.chain.from_iterable(map(extremes, schemas)):
                    rules = [RULE_OF[name]] if name in RULE_OF else ["ancestral"] if name == "steps" else [None]
                    extra = {"rule": rules[0]} if rules[0] else {}
                    found.append((path, {**base, **extra, name: number(value)}))
        for length in range(1, 2 * BLOCK + 2):
            text = self.of_length(length)
            found += [("/v1/score", {"text": text, "draws": draws}) for draws in (2, 16)]
            found.append(("/v1/completions", {"prompt": self.ids[:length], "max_tokens": 1 + length % 5}))
            if self.can_infill:
                found.append(
                    (
                        "/v1/infill",
                        {"prefix": text, "suffix": self.of_length(1 + length % 4), "length_tokens": [length, 3]},
                    )
                )
        for path, base in self.base.items():
            for name, value in [
                ("prompt", ""),
                ("prompt", [0]),
                ("suffix", ""),
                ("prefix", ""),
                ("prompt", self.ids[:31]),
                ("prompt", self.ids[:30]),
            ]:
                if name in self.schemas[path].model_fields:
                    found.append((path, {**base, name: value}))
        self.chance.shuffle(found)
        return found

    def mixed(self):
        """Several fields at once, for ever."""
        chance = self.chance
        while True:
            path = chance.choice(list(self.base))
            body = dict(self.base[path])
            for name, schemas in numeric_fields(self.schemas[path]).items():
                if chance.random() < 0.25:
                    body[name] = number(chance.choice(extremes(chance.choice(schemas))))
            if "temperature" in self.schemas[path].model_fields:
                body |= {"rule": chance.choice(self.rules)} if chance.random() < 0.6 else {}
                for name in [name for name, rule in RULE_OF.items() if name in body and body.get("rule") != rule]:
                    if chance.random() < 0.8:
                        del body[name]
                if chance.random() < 0.5:
                    body |= {
                        "stream": True,
                        "stream_options": {"denoising": chance.random() < 0.7, "include_usage": chance.random() < 0.5},
                    }
                if chance.random() < 0.2:
                    body["stop"] = [
                        chance.choice([text for text in [*STRANGE, "e", " the"] if text])
                        for _ in range(chance.randint(0, 4))
                    ]
                if chance.random() < 0.2:
                    body["grid"] = chance.choice(["uniform", "cosine"])
            length = chance.randint(0, 34)
            if chance.random() < 0.6:
                text = chance.choice([WORDS[: 3 * length], *STRANGE])
                ids = [chance.choice([0, 1, 7, 299, 300, 301, *self.ids]) for _ in range(length)]
                if path == "/v1/score":
                    body["text"] = text
                elif path == "/v1/chat/completions":
                    body["messages"] = [{"role": "user", "content": text}] * chance.randint(0, 2)
                elif path == "/v1/infill":
                    body[chance.choice(["prefix", "suffix"])] = text
                    body["length_tokens"] = chance.choice([length, [length], [1, length, 2], [length] * 8])
                else:
                    body["prompt"] = chance.choice([text, ids, [text, ""], [ids, [3]]])
            yield path, body


def check(path, body, answer):
    """What a 200 says is possible, and everything else is the request's own mistake, or its own deadline."""
    assert answer.status_code in (200, 400, 408), (path, body, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif path == "/v1/score":
        said = strict(answer.text)
        assert math.isfinite(said["nats"]) and said["nats"] >= 0 and math.isfinite(said["bits_per_byte"])
        assert not said["ci95_draws"] or said["ci95_draws"][0] <= said["bits_per_byte"] + 1e-9
    elif body.get("stream"):
        *events, last = answer.text.strip().split("\n\n")
        for chunk in (strict(event.removeprefix("data: ")) for event in events):
            for _, p in chunk.get("dlm_ray", {}).get("canvas", {}).get("tokens", ()):
                assert 0 <= p <= 1, (path, body, chunk)
        assert last == "data: [DONE]" or strict(last.removeprefix("data: "))["error"]["code"] == "deadline", last
    else:
        said = strict(answer.text)
        assert all(choice["finish_reason"] in ("length", "stop") for choice in said["choices"])
        texts = [text_of(choice) for choice in said["choices"]]
        stops = body.get("stop") or []
        assert not any(stop in text for text in texts for stop in ([stops] if isinstance(stops, str) else stops))


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))


def text_of(choice):
    """Of a completion, a chat, or a part of either."""
    return choice["text"] if "text" in choice else choice.get("message", choice.get("delta", {})).get("content", "")


def own_part(answer):
    """An answer without its number and time."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        chunks = [strict(line.removeprefix("data: ")) for line in answer.text.strip().split("\n\n")[:-1]]
        canvases = [chunk["dlm_ray"]["canvas"] for chunk in chunks if "canvas" in chunk.get("dlm_ray", {})]
        return "".join(text_of(choice) for chunk in chunks for choice in chunk["choices"]), canvases
    said = answer.json()
    return [text_of(choice) for choice in said["choices"]] if "choices" in said else {**said, "object": None}


async def beside_innocents(host, app, rounds, chance):
    """Each round's cases at once with requests that have nothing to do with them; some cases are asked again alone."""
    async with client(app) as http:

        async def post(case, leaves_after=None):
            path, body = case
            content = json.dumps({"model": "tiny", **body})
            asking = asyncio.ensure_future(
                http.post(path, content=content, headers={"content-type": "application/json"})
            )
            if leaves_after is not None:
                await asyncio.sleep(leaves_after)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                return None
            async with asyncio.timeout(60):
                return await asking

        innocents = [
            ("/v1/completions", {"prompt": "a", "max_tokens": 20, "seed": 7}),
            (
                "/v1/completions",
                {
                    "prompt": "the model",
                    "max_tokens": 12,
                    "seed": 5,
                    "stream": True,
                    "stream_options": {"denoising": True},
                },
            ),
            ("/v1/score", {"text": "the model reads", "draws": 4, "seed": 2}),
        ]
        if host.describe()["capabilities"]["infill"]:
            innocents.append(("/v1/infill", {"prefix": "the model", "suffix": " row", "length_tokens": 6, "seed": 3}))
        alone = []
        for case in innocents:
            alone.append(own_part(await post(case)))
        for cases, leaves_after in rounds:
            leaver = [post(cases[0], leaves_after)] if leaves_after is not None else []
            *answers, _ = await asyncio.gather(*map(post, [*cases, *innocents]), *leaver, asyncio.sleep(0))
            answers = answers[: len(cases) + len(innocents)]
            for (path, body), answer in zip(cases, answers, strict=False):
                check(path, body, answer)
            said = [own_part(answer) for answer in answers[len(cases) :]]
            assert said == alone, f"beside {cases}"
            again = chance.randrange(len(cases))
            if chance.random() < 0.4 and answers[again].status_code == 200 and "seed" in cases[again][1]:
                assert own_part(await post(cases[again])) == own_part(answers[again]), f"{cases[again]} beside {cases}"
            host.check()
    until(lambda: not (host.engine.num_active or host.engine.waiting))


def in_rounds(cases, chance):
    """A few cases at once, and now and then a client that goes away in the middle."""
    while batch := list(itertools.islice(cases, 5)):
        yield batch, chance.uniform(0, 0.05) if chance.random() < 0.2 else None


def put(runs, kind, build_cases, seed):
    with hosted(runs / kind, **PARTS) as (host, app):
        cases = Cases(host, seed)
        print(f"seed {seed}")  # shown if it fails
        asyncio.run(beside_innocents(host, app, in_rounds(build_cases(cases), cases.chance), cases.chance))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_requests_at_the_extremes_changes_nothing_for_those_beside_them(runs, kind):
    put(
        runs,
        kind,
        lambda cases: itertools.chain(cases.one_by_one()[:60], itertools.islice(cases.mixed(), 30)),
        seed=KINDS.index(kind),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_extreme_and_ten_minutes_of_mixtures_change_nothing_for_those_beside_them(runs, kind):
    end = time.monotonic() + 600 / len(KINDS)
    put(
        runs,
        kind,
        lambda cases: itertools.chain(
            cases.one_by_one(), itertools.takewhile(lambda _: time.monotonic() < end, cases.mixed())
        ),
        seed=random.randrange(2**32),
    )


def test_an_ssd_lm_is_refused_before_anybody_asks_it(runs):
    with pytest.raises(UserError, match="is an SSD-LM, whose blocks cannot share a batch: it cannot be served"):
        EngineWorker(Server(checkpoint=str(runs / "ssd_lm")))
