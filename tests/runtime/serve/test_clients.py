"""Requests to the service on Ray Serve: OpenAI's client, company, and a client that leaves."""

import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from helpers.processes import until

from dlm_ray.config.errors import UserError

pytestmark = pytest.mark.ray


def test_openais_client_gets_the_same_text_alone_streamed_and_among_31_others(deployment):
    url = deployment.use()
    own = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    asked = {"model": "tiny", "prompt": "the model", "max_tokens": 30, "seed": 7}
    whole = own.completions.create(**asked)
    # It may write its end before.
    assert (whole.usage.completion_tokens == 30) == (
        whole.choices[0].finish_reason == "length"
    ) and whole.usage.network_calls["denoising"] > 0
    chunks = list(own.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text and len(chunks) > 2

    def other(number):
        return (
            own.completions.create(model="tiny", prompt="a row " * (number % 3), max_tokens=10 + number, seed=number)
            .choices[0]
            .text
        )

    with ThreadPoolExecutor(32) as clients:
        others = [clients.submit(other, number) for number in range(31)]
        among = clients.submit(lambda: own.completions.create(**asked)).result()
        assert len({one.result() for one in others}) > 25
    assert among.choices[0].text == whole.choices[0].text
    answer = httpx.get(f"{url}/v1/models")
    assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot_within_a_second(deployment, stream):
    url = deployment.use()

    def active():
        return httpx.get(f"{url}/v1/models").json()["data"][0]["load"]["active"]

    body = {"model": "tiny", "prompt": "the model", "max_tokens": 200_000, "temperature": 0, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
        content = httpx.Request("POST", url, json=body).content
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        )
        line.sendall(head.encode() + content)
        until(lambda: active() == 1)
    assert until(lambda: active() == 0) < 1.0


def test_an_address_that_is_taken_is_refused(deployment):
    from dlm_ray.runtime.serve import deploy

    deployment.use()
    with pytest.raises(UserError, match="cannot listen on"):
        deploy.start(deployment.settings())
