"""`dlm-ray sample` and `dlm-ray eval`: text from a checkpoint, and the likelihood of held-out text."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer

from dlm_ray.cli.arguments import Checkpoint, DataFolder, Json, Save, Watch, Weights
from dlm_ray.cli.console import Update, print_bits, progress, show_result
from dlm_ray.cli.sampling_options import with_sampling_options
from dlm_ray.config.errors import UserError


@with_sampling_options
def sample(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default="none")] = "",
    prefix: Annotated[
        str | None, typer.Option(help="Infilling: the text before the gap; needs --suffix.", show_default=False)
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="Infilling: the text after the gap; needs --prefix.", show_default=False)
    ] = None,
    length_tokens: Annotated[
        int | None,
        typer.Option(
            "--length", help="Tokens to generate; required for infilling.", show_default="the rest of the context"
        ),
    ] = None,
    ban: Annotated[
        list[str] | None,
        typer.Option(
            help="Text of one token that is never generated. May be repeated.", metavar="TEXT", show_default=False
        ),
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            help="Fix TEXT at token N after the prompt, counted from 0. May be repeated.",
            metavar="N=TEXT",
            show_default=False,
        ),
    ] = None,
    watch: Watch = False,
    save: Save = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same text.")] = 0,
    weights: Weights = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Generate text from a prompt, or between a prefix and a suffix."""
    if (prefix is None) != (suffix is None):
        raise UserError("`prefix` and `suffix` go together; for one side only use `prompt`")
    if prefix is not None and prompt:
        raise UserError("`prompt` does not go with `prefix` and `suffix`; put it into the prefix")
    if prefix is not None and length_tokens is None:
        raise UserError(
            "`length_tokens` is missing: infilling needs the number of tokens between `prefix` and `suffix`"
        )
    forced = _forced(force or [])
    from dlm_ray.cli.watch import Watcher, checked_recording_path
    from dlm_ray.generation.loading import load

    recording = checked_recording_path(save)
    model = load(checkpoint, weights)
    options |= {"ban": ban or (), "force": forced, "seed": seed}
    watcher = Watcher(model.tokenizer, is_visible=watch, is_saved=recording is not None)
    if watch or recording is not None:
        options["on_text"] = watcher.on_text
    given = (prompt, "") if prefix is None else (prefix, suffix or "")
    with watcher.text(*given), _progress_unless(watch) as update:
        options["on_step"] = lambda step, steps, canvas: update(step, steps)
        if prefix is not None:
            output = model.infill(*given, length_tokens=length_tokens or 0, **options)
        else:
            output = model.sample(prompt, length_tokens=length_tokens, **options)
    if recording is not None:
        watcher.save(recording, " ... ".join(filter(None, given)) or str(checkpoint))
    texts = [f"{given[0]}{text}{given[1]}" for text in output]
    fields = {
        "written": output,
        "texts": texts,
        "network_calls": output.network_calls,
        "stopped_by": output.stopped_by,
    }
    show_result(fields, as_json, lambda: sys.stdout.write("\n---\n".join(texts) + "\n"))


def _progress_unless(is_watched: bool) -> AbstractContextManager[Update]:
    """Return the progress of denoising, or nothing where each step is shown."""
    return nullcontext(lambda done, total: None) if is_watched else progress("denoising: step")


def _forced(options: list[str]) -> dict[int, str]:
    """Return the text by token position of the values of --force."""
    forced: dict[int, str] = {}
    for option in options:
        place, equals, text = option.partition("=")
        if not (equals and place.isdecimal()):
            raise UserError.of("force", option, "allowed is N=TEXT, with N a token's position after the prompt, from 0")
        forced[int(place)] = text
    return forced


def evaluate(
    checkpoint: Checkpoint,
    data: DataFolder,
    split: Annotated[str, typer.Option(help="Split of the data folder: train or held_out.")] = "held_out",
    max_sequences: Annotated[
        int | None, typer.Option(help="Number of sequences, evenly spaced over the split.", show_default="all")
    ] = None,
    draws_per_sequence: Annotated[
        int,
        typer.Option("--draws", help="Draws of (t, mask) per sequence; an autoregressive model needs one."),
    ] = 16,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Measure bits per byte with intervals: exact for an autoregressive model, an upper bound for a diffusion model."""
    from dlm_ray.generation.loading import load

    model = load(checkpoint, weights)
    with progress("sequences x draws:") as update:
        scored = model.score(
            data, split=split, max_sequences=max_sequences, draws_per_sequence=draws_per_sequence, progress=update
        ).as_dict()
    show_result(scored, as_json, lambda: print_bits(scored))
