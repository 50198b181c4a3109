"""`dlm-ray chat`, `--watch` and `--save`: what is streamed, shown and recorded while a text is generated."""

import io
import re
import sys

import pytest
from helpers.commands import dlm_ray
from rich.console import Console

from dlm_ray.checkpoint.export import export
from dlm_ray.cli.chat import Conversation
from dlm_ray.cli.watch import Watcher, live_text, plain_text
from dlm_ray.config.errors import UserError
from dlm_ray.generation.loading import load
from dlm_ray.generation.progress import Span, TextProgress, settled_text, spans
from dlm_ray.report.recording import MASK, Frame, Piece, html, save, wrapped

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
KINDS = ["ar", "whole", "block8"]


@pytest.fixture(scope="module")
def models(runs):
    """Return the models of KINDS, with a chat template."""
    loaded = {kind: load(runs / kind) for kind in KINDS}
    for model in loaded.values():
        model.tokenizer.chat_template = TEMPLATE
    return loaded


@pytest.fixture(scope="module")
def chat_folder(runs, tmp_path_factory):
    """A Hugging Face folder with a chat template."""
    folder = export(str(runs / "block8"), str(tmp_path_factory.mktemp("chat") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def words(text):
    return [ord(character) for character in text]


class Characters:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_of_a_text_end_with_its_tokens_and_settle_once(models, kind):
    model, steps = models[kind], []
    [text] = model.sample("the model", length_tokens=13, seed=3, on_text=steps.append)
    assert not any(steps[-1].is_masked)
    assert model.decode_until_end(steps[-1].ids) == text and len(steps[-1].ids) <= 13
    for before, after in zip(steps, steps[1:], strict=False):
        assert before.num_settled <= after.num_settled
        assert before.ids[: before.num_settled] == after.ids[: before.num_settled]
        assert not any(before.is_masked[: before.num_settled])
        was_masked = [*before.is_masked, *[True] * len(after.ids)]
        assert after.is_new == [was and not now for was, now in zip(was_masked, after.is_masked, strict=False)]
    assert sum(sum(step.is_new) for step in steps) == len(steps[-1].ids)


def test_spans_tell_masked_new_and_settled_tokens_apart_and_keep_characters_whole():
    ids = words("ab") + list("é".encode()) + words("xyz")
    is_masked = [False] * 4 + [True, False, False]
    is_new = [False, False, False, True, False, True, True]
    assert spans(Characters(), TextProgress(ids, is_masked, 4, is_new)) == [
        Span("ab"),
        Span("é", is_new=True),
        Span("", is_masked=True),
        Span("yz", is_new=True),
    ]


def test_settled_text_ends_before_the_end_token_and_before_an_incomplete_character():
    ids = words("ab") + list("é".encode())[:1] + words("x")
    progress = TextProgress(ids, [False] * 4, 3, [False] * 4)
    assert settled_text(Characters(), progress, end_id=0) == "ab"
    assert settled_text(Characters(), TextProgress(words("a\0b"), [False] * 3, 3, [False] * 3), end_id=0) == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_continues_the_rendered_template_greedily(models, kind):
    model = models[kind]
    messages = [
        {"role": "user", "content": "the model"},
        {"role": "assistant", "content": "reads"},
        {"role": "user", "content": "a row"},
    ]
    stop = {} if kind == "whole" else {"stop": ("end",)}
    expected = model.sample("u:the model a:reads u:a row a:", length_tokens=7, temperature=0.0, **stop)
    assert model.chat(messages, length_tokens=7) == expected


def test_a_model_without_a_chat_template_says_what_to_do(runs):
    message = "has no chat template.* use `dlm-ray sample CHECKPOINT --prompt TEXT`"
    with pytest.raises(UserError, match=message):
        load(runs / "ar").chat("Hi")
    done = dlm_ray("chat", runs / "ar")
    assert done.returncode == 2 and re.search(message, done.message)


def test_a_piped_chat_answers_one_turn_per_line_on_stdout(chat_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the model\n/reset\nthe model\n/quit\nnever asked\n"))
    done = dlm_ray("chat", chat_folder, "--length", 6)
    first, again = load(chat_folder).chat("the model", length_tokens=6), done.stdout
    assert done.returncode == 0, done.stderr
    assert again == f"{first[0]}\n" * 2
    statistics = re.findall(r"\((\d+) tokens, (\d\.\d\d) per forward, [\d.,]+ tokens/s\)", done.stderr)
    assert len(statistics) == 2 and statistics[0] == statistics[1] and int(statistics[0][0]) <= 6


def test_ctrl_c_ends_an_answer_and_keeps_its_beginning(models, capsys):
    model = models["block8"]
    watcher = Watcher(model.tokenizer, is_visible=False, is_saved=False)
    conversation = Conversation(model, watcher, "", 20, {"seed": 0}, None)
    shown, calls = watcher.on_text, []

    def interrupted(progress):
        calls.append(progress)
        shown(progress)
        if progress.num_settled >= 8:
            raise KeyboardInterrupt

    watcher.on_text = interrupted
    conversation.ask("the model")
    answer = conversation.messages[-1]["content"]
    output = capsys.readouterr()
    assert answer and output.out == f"{answer}\n" and "(interrupted, " in output.err
    complete = model.chat("the model", length_tokens=20)[0]
    assert complete.startswith(answer) and complete != answer


def test_watch_prints_each_step_into_a_log_with_new_tokens_in_brackets(runs):
    done = dlm_ray("sample", runs / "whole", "--prompt", "the", "--length", 6, "--steps", 3, "--watch", "--seed", 1)
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in steps] == ["step 1, 4 masked", "step 2, 2 masked", "step 3"]
    assert [line.count("░░░") + line.count("___") for line in steps] == [4, 2, 0]
    assert all("[" in line for line in steps), steps


FRAME = Frame("step 2", [Piece("given ", "given"), Piece("old", "settled"), Piece("new", "new"), Piece(MASK, "masked")])


@pytest.mark.parametrize("no_color", [False, True])
def test_masked_new_and_settled_tokens_differ_on_a_terminal_also_without_colour(no_color):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, no_color=no_color, color_system="standard")
    terminal.print(live_text(FRAME, 80, 24))
    line = terminal.file.getvalue().splitlines()[1]
    style = {text: re.search(rf"\x1b\[([\d;]+)m{text}", line)[1].split(";") for text in ("old", "new")}
    assert style["old"] == ["0"] and {"1", "4"} <= set(style["new"])
    assert ("32" in style["new"]) != no_color
    assert MASK.strip() in line


def test_a_dumb_terminal_gets_brackets_and_ascii_masks():
    assert plain_text(FRAME, is_ascii=True) == "step 2: given old[new]___ "


def test_lines_break_at_spaces_within_the_columns_and_lose_nothing():
    pieces = [Piece("one two three\nfour ", "settled"), Piece(MASK * 3, "masked"), Piece("x" * 30, "new")]
    lines = wrapped(pieces, 12)
    assert all(sum(len(piece.text) for piece in line) <= 12 for line in lines)
    assert "".join(piece.text for line in lines for piece in line) == "".join(p.text for p in pieces).replace("\n", "")
    assert [piece.text for piece in lines[0]] == ["one two "]
    assert {piece.kind for line in lines for piece in line if "░" in piece.text} == {"masked"}


def test_a_recording_is_one_page_without_requests_and_with_escaped_text():
    page = html([FRAME, Frame("step 3", [Piece("<script>", "new")])], "a & b")
    assert page.count('class="frame"') == 2 and 'max="1"' in page
    assert "&lt;script&gt;" in page and "a &amp; b" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)


def test_a_recording_as_gif_has_a_frame_per_step(tmp_path):
    from PIL import Image

    save([FRAME, Frame("step 3", [Piece("given oldnewer", "settled")])], tmp_path / "a.gif", "title")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 2


def test_sample_records_its_steps_and_refuses_other_files(runs, tmp_path):
    arguments = ("sample", runs / "block8", "--prompt", "the", "--length", 8, "--save")
    assert "recorded" in dlm_ray(*arguments, tmp_path / "a.html").message
    assert (tmp_path / "a.html").read_text().count('class="frame"') >= 2
    done = dlm_ray(*arguments, tmp_path / "a.mp4")
    assert done.returncode == 2 and "must end with .html or .gif" in done.message
