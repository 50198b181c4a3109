"""`dlm-ray sample` and `dlm-ray eval`: text from a checkpoint, and the likelihood of held-out text."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dlm_ray.cli.arguments import Checkpoint, Json, Weights
from dlm_ray.cli.console import bar, print_bits, show_result, warnings_said
from dlm_ray.config.errors import UserError


def sample(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    prefix: Annotated[str | None, typer.Option(help="With --suffix: text before what is to be written.")] = None,
    suffix: Annotated[str | None, typer.Option(help="With --prefix: text behind it.")] = None,
    length_tokens: Annotated[
        int | None, typer.Option("--length", help="Tokens to write; a whole row without it (needed for infilling).")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Texts to write.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps, of each block where there are blocks; 64, or the length if that is less."),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="What a step reveals: confidence, margin, ancestral, first_hitting, threshold, factor, entropy_bounded; also tweedie (sedd), "
            "state_dependent (genmd4); of ssd_lm sampled, greedy or multi_hot."
        ),
    ] = None,
    block_tokens: Annotated[
        int | None, typer.Option(help="Block by block over a KV cache; as the checkpoint was trained.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of rule threshold: what is more probable is revealed; 0.9.")
    ] = None,
    factor: Annotated[float | None, typer.Option(help="Of rule factor: f in (n + 1)(1 - p) < f; 1.")] = None,
    entropy_bound: Annotated[float | None, typer.Option(help="Of rule entropy_bounded, in nats; 0.1.")] = None,
    remask: Annotated[
        float | None, typer.Option(help="Of rule ancestral: up to this probability of masking again; 0.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Of blocks: end (at an end-of-text token) or entropy (below 4 nats over 256 tokens)."),
    ] = None,
    ban: Annotated[
        list[str] | None, typer.Option(help="A text of one token that is never written.", metavar="TEXT")
    ] = None,
    force: Annotated[
        list[str] | None, typer.Option(help="TEXT stands at token N behind the prompt, from 0.", metavar="N=TEXT")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Times of the steps: uniform, or cosine, which reveals little at first.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token; 1.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus: the smallest set with this much probability; 1.")
    ] = None,
    noise: Annotated[
        str, typer.Option(help="float64, or float32_gumbel, which cuts the tails as MD4's code does.")
    ] = "float64",
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Text from a prompt, or between a prefix and a suffix; what no option says is as the checkpoint's recipe says (`sampling`)."""
    if (prefix is None) != (suffix is None):
        raise UserError("--prefix and --suffix go together; for one side alone use --prompt")
    if prefix is not None and prompt:
        raise UserError("--prompt does not go with --prefix and --suffix; put it into the prefix")
    if prefix is not None and length_tokens is None:
        raise UserError("--length is missing: infilling needs the number of tokens between --prefix and --suffix")
    forced: dict[int, str] = {}
    for one in force or []:
        place, equals, text = one.partition("=")
        if not (equals and place.isdecimal()):
            raise UserError(
                f"--force {one}: allowed is N=TEXT, with N the number of a token behind the prompt, from 0; change --force"
            )
        forced[int(place)] = text
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
    with warnings_said(), bar("denoising") as update:
        options["on_step"] = lambda step, steps, canvas: update(step, steps)
        if prefix is not None:
            written = model.infill(prefix, suffix or "", length_tokens=length_tokens or 0, **options)
        else:
            written = model.sample(prompt, length_tokens=length_tokens, **options)
    texts = [f"{prefix if prefix is not None else prompt}{text}{suffix or ''}" for text in written]
    fields = {
        "written": written,
        "texts": texts,
        "network_calls": written.network_calls,
        "stopped_by": written.stopped_by,
    }
    show_result(fields, as_json, lambda: sys.stdout.write("\n---\n".join(texts) + "\n"))


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="A folder that `data build` wrote with the checkpoint's tokenizer.")],
    split: Annotated[str, typer.Option(help="Of the folder.")] = "held_out",
    max_sequences: Annotated[int | None, typer.Option(help="So many rows, evenly spaced.")] = None,
    draws_per_sequence: Annotated[
        int, typer.Option("--draws", help="Draws of (t, mask) a row; an autoregressive model needs one.")
    ] = 16,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Bits per byte with intervals: exact for an autoregressive model, an upper bound for a diffusion model."""
    from dlm_ray.generation.loading import load

    model = load(checkpoint, weights)
    with warnings_said(), bar("rows x draws") as update:
        scored = model.score(
            data, split=split, max_sequences=max_sequences, draws_per_sequence=draws_per_sequence, progress=update
        ).as_dict()
    show_result(scored, as_json, lambda: print_bits(scored))
