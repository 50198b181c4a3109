"""What a service is to serve is found before anything starts."""

import pytest
from helpers.gguf_files import CONFIGS, random_network, write_gguf

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server
from dlm_ray.serving.pinning import pinned


def test_a_gguf_file_is_pinned_by_its_whole_path_and_checked_before_any_replica_starts(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", random_network(CONFIGS["llama"]))
    monkeypatch.chdir(tmp_path)
    server = pinned(Server(checkpoint="tiny.gguf"))
    assert server.checkpoint == str(tmp_path / "tiny.gguf") and server.served[0].model_name == "tiny.gguf"
    with pytest.raises(
        UserError, match="weights=raw chooses between the weights of a checkpoint of dlm_ray, and this is not one"
    ):
        pinned(Server(checkpoint="tiny.gguf", weights="raw"))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"checkpoint=tiny\.gguf: .* is damaged"):
        pinned(Server(checkpoint="tiny.gguf"))
