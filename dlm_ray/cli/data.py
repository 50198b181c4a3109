"""`dlm-ray data`: build folders of training data from text, and inspect them."""

from __future__ import annotations

from typing import Annotated

import typer

from dlm_ray.cli.arguments import Json
from dlm_ray.cli.console import print_description, print_splits, progress, show_result

data_app = typer.Typer(no_args_is_help=True, help="Build folders of training data from text, and inspect them.")


@data_app.command("build")
def data_build(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text files, .jsonl, .jsonl.gz, .parquet, folders or glob patterns. A text file is one document.",
            metavar="SOURCE...",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder to write: a local path, s3:// or gs://.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens per packed sequence: the context length L.")] = 1024,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer of the model: a Hugging Face folder, a hub name or a GGUF file.", show_default=False
        ),
    ] = None,
    train_tokenizer_vocab: Annotated[
        int | None,
        typer.Option(
            "--train-tokenizer",
            help="Instead of --tokenizer: train a byte-level BPE of VOCAB tokens on the sources.",
            metavar="VOCAB",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the documents, chosen by hash, that is kept for evaluation.")
    ] = 0.01,
    text_field: Annotated[str, typer.Option(help="Field of JSONL records or column of parquet files.")] = "text",
    as_json: Json = False,
) -> None:
    """Tokenize text, pack it into sequences and write webdataset shards with an index.

    The same input gives the same bytes. Rerun the command to resume an interrupted build.
    """
    from dlm_ray.runtime.build import build

    with progress("parts") as update:
        index = build(
            sources,
            out,
            tokenizer=tokenizer,
            train_tokenizer_vocab=train_tokenizer_vocab,
            sequence_length=sequence_length,
            held_out=held_out,
            text_field=text_field,
            progress=update,
        )
    splits = {
        name: {"sequences": split.sequences, "documents": split.documents, "tokens": split.tokens}
        for name, split in index.splits.items()
    }
    show_result({"out": out, "splits": splits}, as_json, lambda: print_splits(out, splits))


@data_app.command("inspect")
def data_inspect(
    path: Annotated[str, typer.Argument(help="Folder that `data build` wrote.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show the splits and the tokenizer of a data folder, and its first sequences as text."""
    from dlm_ray.data.inspect import describe

    description = describe(path)
    show_result(description, as_json, lambda: print_description(description))
