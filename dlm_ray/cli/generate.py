"""`dlm-ray sample` and `dlm-ray eval`: text from a checkpoint, and the likelihood of held-out text."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dlm_ray.cli.arguments import Checkpoint, DataFolder, Json, Weights
from dlm_ray.cli.console import print_bits, progress, show_result
from dlm_ray.config.errors import UserError

# The default of an option that the checkpoint's recipe sets (its keys `sampling`), with the default of that key.
_RECIPE = "as the checkpoint's recipe: {}"


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
    num_samples: Annotated[int, typer.Option(help="Number of texts.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps of the text, or of each block.",
            show_default=_RECIPE.format("64, or the length if it is less"),
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="How a step selects the tokens to reveal: confidence, margin, ancestral, first_hitting, threshold, "
            "factor or entropy_bounded; tweedie (sedd); state_dependent (genmd4); sampled, greedy, multi_hot (ssd_lm).",
            show_default=_RECIPE.format("the first rule of its objective"),
        ),
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option(
            help="Sample block by block over a KV cache, in blocks of this many tokens.",
            show_default="as the checkpoint was trained",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Rule threshold: reveal tokens above this probability.", show_default=_RECIPE.format("0.9")),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(help="Rule factor: f in (n + 1)(1 - p) < f.", show_default=_RECIPE.format("1")),
    ] = None,
    entropy_bound: Annotated[
        float | None,
        typer.Option(help="Rule entropy_bounded: sum of entropies in nats.", show_default=_RECIPE.format("0.1")),
    ] = None,
    remask: Annotated[
        float | None,
        typer.Option(
            help="Rule ancestral: highest probability of masking a revealed token again.",
            show_default=_RECIPE.format("0"),
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="With blocks: stop at an end-of-text token (end), or where the entropy of 256 tokens is below 4 nats "
            "(entropy). May be repeated.",
            show_default="the length only",
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
    grid: Annotated[
        str | None,
        typer.Option(
            help="Times of the steps: uniform, or cosine, which reveals few tokens at first.",
            show_default=_RECIPE.format("uniform"),
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Temperature; 0 takes the most probable token.", show_default=_RECIPE.format("1")),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus: sample from the smallest set of tokens with this probability.",
            show_default=_RECIPE.format("1"),
        ),
    ] = None,
    noise: Annotated[
        str,
        typer.Option(
            help="Precision of sampling: float64, or float32_gumbel, which truncates the tails as in MD4's code."
        ),
    ] = "float64",
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same text.")] = 0,
    weights: Weights = None,
    as_json: Json = False,
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
    from dlm_ray.generation.loading import load

    model = load(checkpoint, weights)
    options: dict[str, Any] = {
        "num_samples": num_samples,
        "block_tokens": block_tokens,
        "threshold": threshold,
        "factor": factor,
        "entropy_bound": entropy_bound,
        "remask": remask,
        "stop": stop or (),
        "ban": ban or (),
        "force": forced,
        "steps": steps,
        "rule": rule,
        "grid": grid,
        "noise": noise,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    with progress("denoising: step") as update:
        options["on_step"] = lambda step, steps, canvas: update(step, steps)
        if prefix is not None:
            output = model.infill(prefix, suffix or "", length_tokens=length_tokens or 0, **options)
        else:
            output = model.sample(prompt, length_tokens=length_tokens, **options)
    texts = [f"{prefix if prefix is not None else prompt}{text}{suffix or ''}" for text in output]
    fields = {
        "written": output,
        "texts": texts,
        "network_calls": output.network_calls,
        "stopped_by": output.stopped_by,
    }
    show_result(fields, as_json, lambda: sys.stdout.write("\n---\n".join(texts) + "\n"))


def _forced(options: list[str]) -> dict[int, str]:
    """Return the text by token position of the values of --force."""
    forced: dict[int, str] = {}
    for option in options:
        place, equals, text = option.partition("=")
        if not (equals and place.isdecimal()):
            raise UserError.of("force", option, "must be N=TEXT, with N a token's position after the prompt, from 0")
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
