"""Service configurations: the shipped files are valid, all mistakes come at once, and messages contain no API key."""

from pathlib import Path

import pytest

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Http
from dlm_ray.config.server_file import load_server, read_keys

SHIPPED = sorted((Path(__file__).parent.parent.parent / "configs/serve").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_service_file_is_valid(path):
    server = load_server(str(path))
    assert server.model_names == (["mine", "blocks"] if path.stem == "several" else [server.model_name])
    changed = (
        ["models.0.checkpoint=x", "models.0.name=renamed"] if server.models else ["checkpoint=runs/x", "name=renamed"]
    )
    assert load_server(str(path), changed).model_names[0] == "renamed"


def test_models_are_named_after_their_checkpoints_unless_they_have_a_name():
    assert load_server("runs/mine/").model_names == ["mine"]
    several = load_server(
        "x", ["checkpoint=null", "models=[{checkpoint: runs/mine}, {checkpoint: org/other, name: renamed}]"]
    )
    assert several.model_names == ["mine", "renamed"] and several.models_at_once == 2
    single = several.of(several.models[1])
    assert (single.checkpoint, single.model_names, single.engine) == ("org/other", ["renamed"], several.engine)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=null"], "checkpoint is missing; give one, or several under models"),
        (["models=[{checkpoint: y}]"], "put all of them under models"),
        (["checkpoint=null", "name=renamed", "models=[{checkpoint: y}]"], "put all of them under models"),
        (
            ["checkpoint=null", "models=[{checkpoint: a/x}, {checkpoint: y}, {checkpoint: b/x}]"],
            "models.2.name=x is also the name of models.0",
        ),
        (
            ["checkpoint=null", "models=[{checkpoint: x}, {checkpoint: y}]", "replicas.models=3"],
            "replicas.models=3, and there are only 2 models",
        ),
        (
            ["checkpoint=null", "models=[{checkpoint: x, weight: y}]"],
            "models.0.weight is unknown; did you mean models.0.weights",
        ),
        (["checkpoint=null", "models=[{name: y}]"], "models.0.checkpoint is missing"),
        (["checkpoint=null", "models=[{checkpoint: x, name: a b}]"], "models.0.name='a b'"),
        (["replicas.models=0"], "replicas.models=0"),
    ],
)
def test_ambiguous_or_too_many_models_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_server("x", overrides)


def test_all_mistakes_are_reported_at_once(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("checkpoint: x\nengine: {slotz: 3}\nhttp: {port: 0, api_keys: [secret]}\nreplicas: {count: -1}\n")
    with pytest.raises(UserError) as raised:
        load_server(str(file))
    for message in (
        "engine.slotz is unknown; did you mean engine.slots",
        "http.port=0",
        "replicas.count=-1",
        "http.api_keys is unknown",
    ):
        assert message in str(raised.value)
    with pytest.raises(UserError, match="max_replicas=1 is less than min_replicas=2"):
        load_server("x", ["replicas.autoscaling={min_replicas: 2, max_replicas: 1}"])
    with pytest.raises(
        UserError, match="replicas.gpus=2 is more than the 1 that a process uses; set it to 1, and replicas.shards=2"
    ):
        load_server("x", ["replicas.gpus=2"])
    with pytest.raises(UserError, match="replicas.gpus=0.5 with replicas.shards=2: each shard needs its own GPU"):
        load_server("x", ["replicas.gpus=0.5", "replicas.shards=2"])
    with pytest.raises(UserError, match="there is no file"):
        load_server(str(tmp_path / "missing.yaml"))


def test_only_loopback_addresses_are_private():
    assert [
        Http(host=host).is_public for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.3", "example.org")
    ] == [False] * 3 + [True] * 3


def test_api_keys_come_from_the_environment_and_a_file_and_appear_in_no_message(tmp_path, monkeypatch):
    first, second = "first-key-long-enough", "second-key-long-enough"
    file = tmp_path / "keys"
    file.write_text(f"# comment\n{second}\n\n{first}\n")
    monkeypatch.setenv("DLM_RAY_API_KEYS", f"{first}, ")
    assert read_keys(str(file)) == [first, second] and read_keys(None) == [first]
    file.write_text("tooshort\n")
    with pytest.raises(UserError, match="1 of 2 API keys are shorter than 16 characters") as raised:
        read_keys(str(file))
    assert "tooshort" not in str(raised.value)
    with pytest.raises(UserError, match="No such file"):
        read_keys(str(tmp_path / "none"))
