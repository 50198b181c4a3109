"""A server file as a config that `serve deploy` takes."""

import importlib
from pathlib import Path

import pytest
import yaml

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server

SHIPPED = Path(__file__).parents[3] / "configs/serve"


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_rendered_configuration_of_a_shipped_file_can_be_deployed_by_serve(file, runs):
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    from dlm_ray.config.server_file import load_server
    from dlm_ray.runtime.serve import deploy as runtime

    server = load_server(str(file))
    own = ["models.0.checkpoint", "models.1.checkpoint"] if server.models else ["checkpoint"]
    server = load_server(str(file), [*(f"{key}={runs / 'block8'}" for key in own), "http.api_keys_file=null"])
    plain = runtime.rendered(server)
    # Serve's schema says nothing of keys that it does not know.
    assert set(plain) <= set(ServeDeploySchema.model_fields) and set(plain["http_options"]) <= set(
        HTTPOptionsSchema.model_fields
    )
    assert all(set(one) <= set(ServeApplicationSchema.model_fields) for one in plain["applications"])
    config = ServeDeploySchema.model_validate(yaml.safe_load(yaml.safe_dump(plain)))
    [one] = config.applications
    assert config.http_options.host == server.http.host and Server.model_validate(one.args) == server
    module, _, name = one.import_path.partition(":")
    front = getattr(importlib.import_module(module), name)(one.args)._bound_deployment
    [engine] = [argument._bound_deployment for argument in front.init_args if hasattr(argument, "_bound_deployment")]
    scaling, asked = engine._deployment_config.autoscaling_config, server.replicas.autoscaling
    assert (scaling and scaling.max_replicas) == (asked and asked.max_replicas)
    assert engine.ray_actor_options["num_gpus"] == server.replicas.gpus


def test_a_contradiction_or_a_missing_checkpoint_is_refused_when_serve_builds_it(tmp_path):
    from dlm_ray.runtime.serve import deploy as runtime

    with pytest.raises(UserError, match="replicas.models=2, and there are only 1 models"):
        runtime.application({"checkpoint": "x", "replicas": {"models": 2}})
    with pytest.raises(
        UserError, match=r"models.0.checkpoint=.*neither a dlm_ray checkpoint .*nor a Hugging Face folder"
    ):
        runtime.application({"models": [{"checkpoint": str(tmp_path)}]})
