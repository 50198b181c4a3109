"""`dlm-ray serve`: run a service until it is stopped, replace a running one, or print its Ray Serve configuration."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dlm_ray.cli.arguments import Json
from dlm_ray.cli.console import print_message, show_result


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help="Service file (examples in configs/serve/), or a checkpoint.",
            metavar="CHECKPOINT | SERVE.yaml",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes, such as engine.slots=8; `dlm-ray schema server` describes all keys.",
            metavar="[KEY=VALUE]...",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on (http.host); a public one needs API keys.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (http.port).", show_default="8000")] = None,
    api_keys_file: Annotated[
        str | None,
        typer.Option(
            help="File with one API key per line; the variable DLM_RAY_API_KEYS works, too.", show_default="no keys"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu or cuda; auto takes CUDA where a replica sees a GPU.", show_default="auto"),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            help="GPUs that each replica reserves (replicas.gpus), at most 1; set 1 to serve on GPUs.", show_default="0"
        ),
    ] = None,
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
        import yaml

        config = deploy.rendered(server)
        return show_result(config, as_json, lambda: sys.stdout.write(yaml.safe_dump(config, sort_keys=False)))

    names = ", ".join(server.model_names)

    def ready(url: str, environment: dict[str, str]) -> None:
        fields = {"url": url, "models": server.model_names, "environment": environment}
        variables = " ".join(f"{key}={value}" for key, value in environment.items())
        text = (
            f"{names} at {url} (playground) and {url}/v1; other commands find this Ray cluster with {variables}; "
            "Ctrl-C finishes accepted requests and stops"
        )
        show_result(fields, as_json, lambda: print_message(text))
        sys.stdout.flush()

    if not replace:
        return deploy.run(server, ready)
    url = deploy.replace_running(server)
    show_result({"url": url, "models": server.model_names}, as_json, lambda: print_message(f"{names} at {url} now"))
