"""Which cluster a command uses: what RAY_ADDRESS may say."""

import socket

import pytest

from dlm_ray.config.errors import UserError
from dlm_ray.runtime import cluster


@pytest.mark.parametrize("context", [cluster.session, cluster.running])
def test_an_address_without_an_answer_is_reported_at_once(context, monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{held.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            monkeypatch.setenv("RAY_ADDRESS", given)
            with pytest.raises(UserError, match=f"RAY_ADDRESS={given}: nothing answers there .*unset it"), context():
                pass


@pytest.mark.parametrize("given", ["somewhere", "10.0.0.1", ":6379", "head:port", "127.0.0.1:99999999"])
def test_a_malformed_address_is_refused(given, monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={given}"), cluster.session():
        pass
