"""Command-line options that are generated from the models of `config.sampling`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from dlm_ray.config.sampling import PYTHON_ONLY, RULE_OF, LocalSampling, Sampling


def with_sampling_options(
    command: Callable[..., None], *, without: Collection[str] = (), defaults: Mapping[str, str] | None = None
) -> Callable[..., None]:
    """Replace the `**options` of a command by one option per field of `LocalSampling`; an option left out is None.

    Args:
        command: the command.
        without: fields that the command does not have.
        defaults: the command's own defaults, as the help shows them.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, info in LocalSampling.model_fields.items():
        if name not in PYTHON_ONLY and name not in without:
            default = (defaults or {}).get(name) or _default(name, info)
            option = typer.Option(help=_help(name, info), show_default=default)
            annotation: Any = Annotated[_option_type(info.annotation) | None, option]
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=None, annotation=annotation))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def _option_type(annotation: Any) -> Any:
    """Return the type on the command line: a list for a tuple, text for a Literal; the model checks the values."""
    origin = get_origin(annotation)
    if origin is Literal:
        return str
    if origin is tuple:
        return list[str]
    members = [member for member in get_args(annotation) if member is not NoneType]
    return _option_type(members[0]) if members else annotation


def _help(name: str, info: FieldInfo) -> str:
    """Return the meaning of an option on one line, with its rule."""
    text = " ".join((info.description or "").split()).replace("`", "")
    if name in RULE_OF:
        text = f"For --rule {RULE_OF[name]}. {text}"
    return text


def _default(name: str, info: FieldInfo) -> str | bool:
    """Return the default as the help shows it; False where the description has it."""
    if info.default in (None, ()):
        return False
    return f"as the checkpoint's recipe: {info.default}" if name in Sampling.model_fields else str(info.default)
