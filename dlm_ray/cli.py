"""The verbs: parse, validate, only then import. Exit code 0 for success, 2 for what was typed wrong, 75 for a run that stopped, 1 for anything else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from dlm_ray.cli_serve import serve
from dlm_ray.cli_sweep import sweep_app
from dlm_ray.config.errors import DamageError, Stopped, UserError
from dlm_ray.console import (
    bar,
    console,
    print_bits,
    print_described,
    print_mapping,
    print_quickstart,
    print_splits,
    say,
    show_result,
    stage_bar,
    warnings_said,
)

# The parser's own complaint, whichever copy of click typer brings.
_Usage: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn an autoregressive language model into a diffusion language model, on one laptop or on a Ray cluster.",
)
data_app = typer.Typer(no_args_is_help=True, help="Build folders of shards from text, and look into them.")
checkpoint_app = typer.Typer(no_args_is_help=True, help="List, verify and prune the checkpoints of a run.")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(sweep_app, name="sweep")
app.command()(serve)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Checkpoint = Annotated[str, typer.Argument(help="A step directory, a run directory (its last step), a Hugging Face folder or a hub name.")]
Weights = Annotated[str | None, typer.Option(help="ema or raw; the average if the run kept one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, such as training.steps=100.", metavar="[KEY=VALUE]...")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Options before the verb; `main` reads --debug itself."""


@app.command()
def quickstart(
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Everything in two minutes with a few steps: does it run here?")] = False,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/quickstart"),
    as_json: Json = False,
) -> None:
    """The whole main job on this machine: data, an AR base, its adaptation, the bound, samples, infilling, export, a report."""
    from dlm_ray.runtime.quickstart import quickstart as run

    with stage_bar() as show:
        report = run(out, smoke=smoke, overrides=overrides or [], show=show)
    show_result(report, as_json, lambda: print_quickstart(report, out))


@data_app.command("build")
def data_build(
    sources: Annotated[
        list[str], typer.Argument(help="Text files, .jsonl, .jsonl.gz, .parquet, folders or patterns.", metavar="SOURCE...")
    ],
    out: Annotated[str, typer.Option(help="A local folder, s3:// or gs://.")],
    row_tokens: Annotated[int, typer.Option(help="Tokens of a row: the context length L.")] = 1024,
    tokenizer: Annotated[str | None, typer.Option(help="A Hugging Face folder or hub name.")] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(help="Or: train a byte-level BPE of so many tokens on the sources.", metavar="VOCAB")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the documents, by hash, that is kept for evaluation.")] = 0.01,
    text_field: Annotated[str, typer.Option(help="Field of JSONL records, column of parquet files.")] = "text",
    as_json: Json = False,
) -> None:
    """Text -> tokens -> packed rows -> webdataset shards with an index. The same input gives the same bytes; an interrupted build goes on."""
    from dlm_ray.runtime.build import build

    with bar("parts") as update:
        index = build(
            sources,
            out,
            tokenizer=tokenizer,
            train_tokenizer_vocab=train_tokenizer,
            row_tokens=row_tokens,
            held_out=held_out,
            text_field=text_field,
            progress=update,
        )
    splits = {name: {"rows": split.rows, "documents": split.documents, "tokens": split.tokens} for name, split in index.splits.items()}
    show_result({"out": out, "splits": splits}, as_json, lambda: print_splits(out, splits))


@data_app.command("inspect")
def data_inspect(path: Annotated[str, typer.Argument(help="A folder that `data build` wrote.")], as_json: Json = False) -> None:
    """What a data folder holds: splits, tokenizer, and its first rows as text."""
    from dlm_ray.data.inspect import describe

    described = describe(path)
    show_result(described, as_json, lambda: print_described(described))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The run lies in OUT/<name>-<hash>.")] = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start another run beside one that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print it, with all defaults.")] = False,
    as_json: Json = False,
) -> None:
    """One run on Ray. The same command resumes a run that was interrupted; a finished one says so. SIGTERM commits and exits with 75."""
    from dlm_ray.config.load import load_recipe

    checked = load_recipe(recipe, overrides or [])
    if dry_run:
        import yaml

        whole = checked.model_dump(mode="json")
        return show_result(whole, as_json, lambda: sys.stdout.write(yaml.safe_dump(whole, sort_keys=False)))
    from dlm_ray.runtime.train import fit

    with bar("steps") as update:
        result = fit(checked, out, fresh=fresh, on_event=lambda event: update(event["step"], checked.training.steps))
    fields = {**vars(result), "run_dir": str(result.run_dir)}
    what = "was finished before" if result.already_finished else "is finished"
    bits = result.metrics.get("validation", {}).get("bits_per_byte")
    show_result(
        fields,
        as_json,
        lambda: say(f"{checked.name} {what}: {result.checkpoint}" + (f", {bits:.3f} bits per byte on held-out rows" if bits else "")),
    )


@app.command()
def sample(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    prefix: Annotated[str | None, typer.Option(help="With --suffix: text before what is to be written.")] = None,
    suffix: Annotated[str | None, typer.Option(help="With --prefix: text behind it.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens to write; a whole row without it (needed for infilling).")] = None,
    num_samples: Annotated[int, typer.Option(help="Texts to write.")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps, of each block where there are blocks; 64, or the length if that is less.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="What a step reveals: confidence, margin, ancestral, first_hitting, threshold, factor, entropy_bounded; also tweedie (sedd), "
            "state_dependent (genmd4); of ssd_lm sampled, greedy or multi_hot."
        ),
    ] = None,
    block_tokens: Annotated[int | None, typer.Option(help="Block by block over a KV cache; as the checkpoint was trained.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of rule threshold: what is more probable is revealed; 0.9.")] = None,
    factor: Annotated[float | None, typer.Option(help="Of rule factor: f in (n + 1)(1 - p) < f; 1.")] = None,
    entropy_bound: Annotated[float | None, typer.Option(help="Of rule entropy_bounded, in nats; 0.1.")] = None,
    remask: Annotated[float | None, typer.Option(help="Of rule ancestral: up to this probability of masking again; 0.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Of blocks: end (at an end-of-text token) or entropy (below 4 nats over 256 tokens).")
    ] = None,
    ban: Annotated[list[str] | None, typer.Option(help="A text of one token that is never written.", metavar="TEXT")] = None,
    force: Annotated[list[str] | None, typer.Option(help="TEXT stands at token N behind the prompt, from 0.", metavar="N=TEXT")] = None,
    grid: Annotated[str | None, typer.Option(help="Times of the steps: uniform, or cosine, which reveals little at first.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token; 1.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus: the smallest set with this much probability; 1.")] = None,
    noise: Annotated[str, typer.Option(help="float64, or float32_gumbel, which cuts the tails as MD4's code does.")] = "float64",
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Text from a prompt, or between a prefix and a suffix; what no option says is as the checkpoint's recipe says (`sampling`)."""
    if (prefix is None) != (suffix is None):
        raise UserError("--prefix and --suffix go together; for one side alone use --prompt")
    if prefix is not None and prompt:
        raise UserError("--prompt does not go with --prefix and --suffix; put it into the prefix")
    if prefix is not None and length is None:
        raise UserError("--length is missing: infilling needs the number of tokens between --prefix and --suffix")
    forced: dict[int, str] = {}
    for one in force or []:
        place, equals, text = one.partition("=")
        if not (equals and place.isdecimal()):
            raise UserError(f"--force {one}: allowed is N=TEXT, with N the number of a token behind the prompt, from 0; change --force")
        forced[int(place)] = text
    from dlm_ray.serving.loading import load

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
            written = model.infill(prefix, suffix or "", length_tokens=length or 0, **options)
        else:
            written = model.sample(prompt, length_tokens=length, **options)
    texts = [f"{prefix if prefix is not None else prompt}{text}{suffix or ''}" for text in written]
    fields = {"written": written, "texts": texts, "network_calls": written.network_calls, "stopped_by": written.stopped_by}
    show_result(fields, as_json, lambda: sys.stdout.write("\n---\n".join(texts) + "\n"))


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="A folder that `data build` wrote with the checkpoint's tokenizer.")],
    split: Annotated[str, typer.Option(help="Of the folder.")] = "held_out",
    max_rows: Annotated[int | None, typer.Option(help="So many rows, evenly spaced.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of (t, mask) a row; an autoregressive model needs one.")] = 16,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Bits per byte with intervals: exact for an autoregressive model, an upper bound for a diffusion model."""
    from dlm_ray.serving.loading import load

    model = load(checkpoint, weights)
    with bar("rows x draws") as update:
        scored = model.score(data, split=split, max_rows=max_rows, draws_per_row=draws, progress=update).as_dict()
    show_result(scored, as_json, lambda: print_bits(scored))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A step directory, or a run directory (its last step).")],
    folder: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """A Hugging Face folder that stock transformers opens."""
    from dlm_ray.checkpoint.export import export as run

    written = run(checkpoint, str(folder), weights=weights)
    show_result({"folder": str(written)}, as_json, lambda: say(f"exported to {written}"))


@checkpoint_app.command("list")
def checkpoint_list(path: Annotated[str, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """The committed steps of a run."""
    from dlm_ray.checkpoint.listing import committed_steps

    steps = committed_steps(path)
    show_result({"steps": steps}, as_json, lambda: sys.stdout.write("".join(f"{step}\n" for step in steps)))


@checkpoint_app.command("verify")
def checkpoint_verify(
    path: Annotated[str, typer.Argument(help="A step directory, or a run directory (its last step).")], as_json: Json = False
) -> None:
    """Reads every chunk of a checkpoint; exit code 1 if anything is wrong."""
    from dlm_ray.checkpoint.commit import verify
    from dlm_ray.checkpoint.weights import our_checkpoint

    directory = our_checkpoint(path) or path
    findings = verify(directory)
    show_result(
        {"directory": directory, "findings": findings}, as_json, lambda: None if findings else say(f"{directory}: every chunk is good")
    )
    if findings:
        raise DamageError("\n".join(findings))


@checkpoint_app.command("prune")
def checkpoint_prune(
    path: Annotated[str, typer.Argument(help="A run directory.")],
    keep_last: Annotated[int, typer.Option(help="The last so many committed steps stay.", min=1)] = 1,
    keep_best: Annotated[int, typer.Option(help="So do those with the fewest held-out nats a token.", min=0)] = 0,
    keep_every: Annotated[int, typer.Option(help="And every step that is a multiple of it; 0 for none.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Removes committed steps but the last ones, the best ones and regular ones."""
    from dlm_ray.checkpoint.listing import prune

    removed = prune(path, keep_last, keep_best=keep_best, keep_every_steps=keep_every)
    show_result({"removed": removed}, as_json, lambda: say(f"removed steps {removed}" if removed else "nothing to remove"))


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="recipe, sweep or server")] = "recipe") -> None:
    """The JSON Schema of a recipe, a sweep or a server, for editors."""
    from dlm_ray.config.recipe import Recipe
    from dlm_ray.config.server import Server
    from dlm_ray.config.sweep import Sweep

    kinds: dict[str, Any] = {"recipe": Recipe, "sweep": Sweep, "server": Server}
    if kind not in kinds:
        raise UserError(f"there is no schema {kind!r}; allowed is {', '.join(kinds)}")
    sys.stdout.write(json.dumps(kinds[kind].model_json_schema(), indent=2) + "\n")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, cores, memory, GPUs and disk of this machine, and what is missing."""
    import importlib.metadata
    import os
    import platform
    import shutil

    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("torch", "ray", "transformers", "tensorstore", "flash-attn", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "no device"
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    found["free_disk_gib"] = round(shutil.disk_usage(".").free / 2**30, 1)
    show_result(found, as_json, lambda: print_mapping("this machine", found))


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        outcome = app([argument for argument in arguments if argument != "--debug"], standalone_mode=False)
        sys.exit(outcome if isinstance(outcome, int) else 0)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except _Usage as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # the last place where anything can be said
        if debug:
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    """Prints what a person needs of an error; its exit code."""
    if isinstance(error, Stopped):
        console.print(f"[yellow]stopped:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 75
    if isinstance(error, DamageError):
        console.print(f"[red]damaged:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1
    if isinstance(error, UserError):
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 2
    console.print(
        f"[red]failed:[/] {escape(f'{type(error).__name__}: {error}')}\nRun again as `dlm-ray --debug ...` for the traceback.",
        soft_wrap=True,
        highlight=False,
    )
    return 1
