"""`dlm-ray data`: build folders of shards from text, and inspect them."""

from __future__ import annotations

from typing import Annotated

import typer

from dlm_ray.cli.arguments import Json
from dlm_ray.cli.console import bar, print_described, print_splits, show_result

data_app = typer.Typer(no_args_is_help=True, help="Build folders of shards from text, and look into them.")


@data_app.command("build")
def data_build(
    sources: Annotated[
        list[str],
        typer.Argument(help="Text files, .jsonl, .jsonl.gz, .parquet, folders or patterns.", metavar="SOURCE..."),
    ],
    out: Annotated[str, typer.Option(help="A local folder, s3:// or gs://.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row: the context length L.")] = 1024,
    tokenizer: Annotated[str | None, typer.Option(help="A Hugging Face folder, a hub name or a GGUF file.")] = None,
    train_tokenizer_vocab: Annotated[
        int | None,
        typer.Option(
            "--train-tokenizer", help="Or: train a byte-level BPE of VOCAB tokens on the sources.", metavar="VOCAB"
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the documents, by hash, that is kept for evaluation.")
    ] = 0.01,
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
            train_tokenizer_vocab=train_tokenizer_vocab,
            sequence_length=sequence_length,
            held_out=held_out,
            text_field=text_field,
            progress=update,
        )
    splits = {
        name: {"rows": split.rows, "documents": split.documents, "tokens": split.tokens}
        for name, split in index.splits.items()
    }
    show_result({"out": out, "splits": splits}, as_json, lambda: print_splits(out, splits))


@data_app.command("inspect")
def data_inspect(
    path: Annotated[str, typer.Argument(help="A folder that `data build` wrote.")], as_json: Json = False
) -> None:
    """What a data folder holds: splits, tokenizer, and its first rows as text."""
    from dlm_ray.data.inspect import describe

    described = describe(path)
    show_result(described, as_json, lambda: print_described(described))
