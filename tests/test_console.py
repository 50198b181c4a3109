"""Output of commands: plain progress lines in logs, warnings as messages."""

import logging
import warnings

import pytest

from dlm_ray.cli.console import ProgressLines, progress, stage_progress, warnings_printed


@pytest.fixture
def clock():
    class Clock:
        seconds = 0.0

        def __call__(self):
            return self.seconds

    return Clock()


def lines(capfd):
    return capfd.readouterr().err.splitlines()


def test_without_a_terminal_progress_is_a_line_every_30_seconds_with_metrics_and_time_left(clock, capfd):
    update = ProgressLines("train: step", is_long=True, clock=clock)
    for step in range(10, 101, 10):
        update(step, 100, f"loss {step / 100:.2f}, 500 tokens/s" if step != 50 else "")
        clock.seconds += 11
    assert lines(capfd) == [
        "train: step 10 of 100, loss 0.10, 500 tokens/s",
        "train: step 40 of 100, loss 0.40, 500 tokens/s, 0:01:06 left",
        "train: step 70 of 100, loss 0.70, 500 tokens/s, 0:00:33 left",
        "train: step 100 of 100, loss 1.00, 500 tokens/s",
    ]


def test_a_resumed_run_estimates_the_time_left_from_this_session_only(clock, capfd):
    update = ProgressLines("step", is_long=True, clock=clock)
    update(900, 1000)
    clock.seconds = 50.0
    update(910, 1000)
    assert lines(capfd)[-1] == "step 910 of 1000, 0:07:30 left"


def test_stages_are_numbered_lines_in_a_log(capfd):
    with stage_progress() as show:
        for stage in ("data", "train adapted"):
            show(stage, 0, 1)
            show(stage, 1, 1)
    assert [line.strip() for line in lines(capfd)] == ["1. data ...", "2. train adapted ..."]


def test_a_short_task_prints_no_progress_into_a_log(capfd):
    with progress("parts") as update:
        update(1, 2)
        update(2, 2)
    assert lines(capfd) == []


def test_a_task_that_turns_out_to_be_long_prints_lines(clock, capfd):
    update = ProgressLines("parts", clock=clock)
    for done in (1, 2, 3):
        update(done, 3)
        clock.seconds += 20
    assert lines(capfd) == ["parts 3 of 3"]


def test_warnings_of_the_library_are_printed_as_messages(capfd):
    with warnings_printed():
        warnings.warn("the held_out split is empty", stacklevel=1)
        logging.getLogger("dlm_ray.training.setup").warning("nothing is %s", "validated")
    assert lines(capfd) == ["warning: the held_out split is empty", "warning: nothing is validated"]
