"""`dlm-ray chat`: a conversation with a checkpoint in the terminal, or with one question per line of stdin."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlm_ray.cli.arguments import Checkpoint, Save, Watch, Weights
from dlm_ray.cli.console import console, print_message
from dlm_ray.cli.sampling_options import with_sampling_options
from dlm_ray.config.errors import UserError

if TYPE_CHECKING:
    from dlm_ray.generation.progress import TextProgress
    from dlm_ray.generation.text_model import TextModel


@partial(with_sampling_options, without=("num_samples",), defaults={"temperature": "0", "stop": "end"})
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str, typer.Option(help="System message.", show_default="the template's")] = "",
    length_tokens: Annotated[
        int | None,
        typer.Option(
            "--length", help="Most tokens of an answer.", show_default="512; 128 where whole texts are sampled"
        ),
    ] = None,
    watch: Watch = False,
    save: Save = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same answers.")] = 0,
    weights: Weights = None,
    **options: Any,
) -> None:
    """Chat with a checkpoint through its tokenizer's chat template; autoregressive models work as well.

    The text appears as blocks are finished. /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an
    answer. With piped input, each line is a turn: the answers go to stdout, everything else to stderr.
    """
    from dlm_ray.cli.watch import Watcher, checked_recording_path
    from dlm_ray.generation.chat import check_chat
    from dlm_ray.generation.loading import load

    recording = checked_recording_path(save)
    model = load(checkpoint, weights)
    check_chat(model)
    watcher = Watcher(model.tokenizer, is_visible=watch, is_saved=recording is not None)
    conversation = Conversation(model, watcher, system, length_tokens, {**options, "seed": seed}, recording)
    if sys.stdin.isatty():
        print_message("/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer")
    for question in _questions():
        if question == "/quit":
            break
        if question == "/reset":
            conversation.reset()
            print_message("the conversation is forgotten")
        elif question:
            conversation.ask(question)


def _questions() -> Iterator[str]:
    """Yield the lines of the user until the end of the input; Ctrl-C at the prompt ends it, too."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = console.input("[bold]> [/]") if is_terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not line and not is_terminal:
            return
        yield line.strip()


class Conversation:
    """The messages so far, and how the next answer is generated and printed.

    Args:
        model: with a chat template.
        watcher: shows or keeps the steps of an answer.
        system: system message; empty for that of the template.
        length_tokens: most tokens of an answer.
        options: sampling options.
        recording: file for the steps of the last answer.
    """

    def __init__(
        self,
        model: TextModel,
        watcher: Any,
        system: str,
        length_tokens: int | None,
        options: dict[str, Any],
        recording: Path | None,
    ):
        self._model, self._watcher, self._recording = model, watcher, recording
        self._length_tokens, self._options = length_tokens, options
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns, and keep the system message."""
        self.messages = [*self._first]

    def ask(self, question: str) -> None:
        """Answer one turn; an interrupt before any text leaves the conversation as it was.

        An error in a later turn, such as a full context, does so, too.

        Raises:
            UserError: in the first turn.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        stream = _Stream(self._model, is_silent=self._watcher.is_visible)
        started = time.perf_counter()
        is_interrupted = False
        try:
            with self._watcher.text():
                output = self._model.chat(
                    asked, length_tokens=self._length_tokens, on_text=self._on_text(stream), **self._options
                )
            answer = output[0]
        except KeyboardInterrupt:
            answer, is_interrupted = stream.text, True
        except UserError as error:
            if len(self.messages) == len(self._first):
                raise
            print_message(f"{error}; /reset forgets the conversation", label="error")
            return
        seconds = time.perf_counter() - started - self._watcher.waited_seconds
        stream.finish(answer)
        if is_interrupted and not answer:
            print_message("interrupted before the first text; the question is forgotten")
            return
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        calls = stream.num_calls if is_interrupted else sum(output.network_calls.values())
        per_forward = stream.num_tokens / max(1, calls)
        note = "interrupted, " if is_interrupted else ""
        print_message(
            f"({note}{stream.num_tokens} tokens, {per_forward:.2f} per forward, "
            f"{stream.num_tokens / seconds:,.1f} tokens/s)"
        )
        if self._recording is not None:
            self._watcher.save(self._recording, question)

    def _on_text(self, stream: _Stream) -> Any:
        def callback(progress: TextProgress) -> None:
            stream.on_text(progress)
            self._watcher.on_text(progress)

        return callback


class _Stream:
    """Prints the settled part of an answer as it grows."""

    def __init__(self, model: TextModel, *, is_silent: bool):
        self._model, self._is_silent = model, is_silent
        self.text = ""
        self.num_tokens = self.num_calls = 0

    def on_text(self, progress: TextProgress) -> None:
        """Print what is settled and not printed yet."""
        from dlm_ray.generation.progress import settled_text

        self.num_calls += 1
        end_id = self._model.tokenizer_identity.end_id
        ids = progress.ids[: progress.num_settled]
        self.num_tokens = ids.index(end_id) + 1 if end_id in ids else len(ids)
        text = settled_text(self._model.tokenizer, progress, end_id)
        if text.startswith(self.text):
            self._write(text[len(self.text) :])
            self.text = text

    def finish(self, answer: str) -> None:
        """Print the rest of the answer and end the line."""
        if self._is_silent:
            sys.stdout.write(answer)
        elif answer.startswith(self.text):
            self._write(answer[len(self.text) :])
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _write(self, text: str) -> None:
        if text and not self._is_silent:
            sys.stdout.write(text)
            sys.stdout.flush()
