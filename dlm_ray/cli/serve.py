"""`dlm-ray serve`: run a service until it is stopped, replace a running one, or print its Ray Serve configuration."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from dlm_ray.cli.arguments import Json
from dlm_ray.cli.console import print_message, show_result

Target = Annotated[
    str,
    typer.Argument(
        help="Service file (examples in configs/serve/), or a checkpoint.",
        metavar="CHECKPOINT | SERVE.yaml",
        show_default=False,
    ),
]
ServerOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes, such as engine.slots=8; `dlm-ray schema server` describes all keys.",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
Host = Annotated[
    str | None,
    typer.Option(help="Address to listen on (http.host); a public one needs API keys.", show_default="127.0.0.1"),
]
Port = Annotated[int | None, typer.Option(help="Port to listen on (http.port).", show_default="8000")]
KeysFile = Annotated[
    str | None,
    typer.Option(
        help="File with one API key per line; the variable DLM_RAY_API_KEYS works, too.", show_default="no keys"
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu or cuda; auto takes CUDA where a replica sees a GPU.", show_default="auto"),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        help="GPUs that each replica reserves (replicas.gpus), at most 1; set 1 to serve on GPUs.", show_default="0"
    ),
]


def serve(
    target: Target,
    overrides: ServerOverrides = None,
    host: Host = None,
    port: Port = None,
    api_keys_file: KeysFile = None,
    device: Device = None,
    gpus: Gpus = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the running service by this one without failing a request.")
    ] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Print a configuration for `serve deploy` or KubeRay and exit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve checkpoints through an OpenAI-compatible API on Ray Serve, with a playground page.

    Ctrl-C finishes the accepted requests and stops the service.
    """
    from dlm_ray.config.server_file import load_server

    options = {
        "http.host": host,
        "http.port": port,
        "http.api_keys_file": api_keys_file,
        "device": device,
        "replicas.gpus": gpus,
    }
    named = [f"{key}={value}" for key, value in options.items() if value is not None]
    server = load_server(target, [*(overrides or []), *named])
    from dlm_ray.runtime.serve import deploy

    if render:
        _show_rendered(deploy.rendered(server), as_json)
    elif replace:
        url = deploy.replace_running(server)
        fields = {"url": url, "models": server.model_names}
        show_result(fields, as_json, lambda: print_message(f"{', '.join(server.model_names)} at {url} now"))
    else:
        deploy.run(server, lambda url, environment: _show_ready(server.model_names, url, environment, as_json))


def _show_rendered(config: dict[str, Any], as_json: bool) -> None:
    """Print a Ray Serve configuration as YAML or JSON."""
    import yaml

    show_result(config, as_json, lambda: sys.stdout.write(yaml.safe_dump(config, sort_keys=False)))


def _show_ready(names: Sequence[str], url: str, environment: Mapping[str, str], as_json: bool) -> None:
    """Print where the service is, and how other commands find its Ray cluster."""
    fields = {"url": url, "models": names, "environment": environment}
    variables = " ".join(f"{key}={value}" for key, value in environment.items())
    text = (
        f"{', '.join(names)} at {url} (playground) and {url}/v1; other commands find this Ray cluster with "
        f"{variables}; Ctrl-C finishes accepted requests and stops"
    )
    show_result(fields, as_json, lambda: print_message(text))
    sys.stdout.flush()
