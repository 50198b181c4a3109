"""The verb `serve`: a server's file or a checkpoint, checked; then the service until it is told to end."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dlm_ray.cli.console import print_message, show_result


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help="A server's YAML file (configs/serve/), or a checkpoint.", metavar="CHECKPOINT | SERVE.yaml"
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes, such as engine.slots=8; see `dlm-ray schema server`.", metavar="[KEY=VALUE]..."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="127.0.0.1; others than this machine reach any other, and it needs keys.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="8000.")] = None,
    api_keys_file: Annotated[str | None, typer.Option(help="One key a line; DLM_RAY_API_KEYS does the same.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Go over to this in the service that runs, without a failed request.")
    ] = False,
    render: Annotated[bool, typer.Option("--render", help="Print a config for `serve deploy` instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """An OpenAI-compatible endpoint on Ray Serve, with a playground at its address; until Ctrl-C, which finishes what was accepted."""
    from dlm_ray.config.server_file import load_server

    asked = {"host": host, "port": port, "api_keys_file": api_keys_file}
    named = [f"http.{key}={value}" for key, value in asked.items() if value is not None]
    server = load_server(target, [*(overrides or []), *named])
    from dlm_ray.runtime.serve import deploy as service

    if render:
        import yaml

        whole = service.rendered(server)
        return show_result(whole, as_json, lambda: sys.stdout.write(yaml.safe_dump(whole, sort_keys=False)))

    names = ", ".join(server.model_names)

    def ready(url: str, environment: dict[str, str]) -> None:
        fields = {"url": url, "models": server.model_names, "environment": environment}
        own = " ".join(f"{key}={value}" for key, value in environment.items())
        text = f"{names} at {url} (playground) and {url}/v1; other commands find its cluster with {own}; Ctrl-C drains and ends"
        show_result(fields, as_json, lambda: print_message(text))
        sys.stdout.flush()

    if not replace:
        return service.run(server, ready)
    url = service.replace_running(server)
    show_result({"url": url, "models": server.model_names}, as_json, lambda: print_message(f"{names} at {url} now"))
