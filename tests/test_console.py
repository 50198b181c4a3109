"""Output of commands: plain or JSON progress lines in logs, one live line on a terminal, warnings as messages."""

import json
import logging
import warnings

import pytest

from dlm_ray.cli import console
from dlm_ray.cli.console import ProgressLines, progress, set_log_format, stage_progress, warnings_printed
from dlm_ray.cli.run_display import RunLines, RunStatus, run_display


@pytest.fixture
def clock():
    class Clock:
        seconds = 0.0

        def __call__(self):
            return self.seconds

    return Clock()


@pytest.fixture
def json_log():
    set_log_format("json")
    yield
    set_log_format("text")


def lines(capfd):
    return capfd.readouterr().err.splitlines()


def metrics(step, **fields):
    return {"step": step, "loss": step / 100, "annealing_ratio": 1.0, "tokens_per_second": 500.0, **fields}


def test_a_short_task_prints_no_progress_into_a_log(capfd):
    with progress("parts") as update:
        update(1, 2)
        update(2, 2)
    assert lines(capfd) == []


def test_a_long_task_is_a_line_every_10_seconds_with_the_time_left_and_its_end_once(clock, capfd):
    update = ProgressLines("parts", clock=clock)
    for done in (1, 2, 3, 4, 4):
        update(done, 4)
        clock.seconds += 6
    assert lines(capfd) == ["parts 3 of 4, 0:00:06 left", "parts 4 of 4"]


def test_stages_are_numbered_lines_in_a_log(capfd):
    with stage_progress() as show:
        for stage in ("data", "train adapted"):
            show(stage, 0, 1)
            show(stage, 1, 1)
    assert [line.strip() for line in lines(capfd)] == ["1. data ...", "2. train adapted ..."]


def test_the_log_of_a_run_has_a_line_per_event_and_one_every_10_seconds(clock, capfd):
    run = RunLines(RunStatus("adapt", 100), lambda kind, status: console.print_message(status.line()), clock)
    run.begin("runs/adapt-1")
    clock.seconds += 11  # the workers start
    run.tick()
    run.tick()
    run.on_event({"step": 1, "tokens_per_second": 0.0})
    clock.seconds += 9
    run.on_event(metrics(10, annealing_ratio=0.25, block_tokens=2))
    clock.seconds += 9
    run.on_event(metrics(20))
    run.on_event({"step": 20, "validation": {"bits_per_byte": 1.23456}})
    run.on_event({"step": 20, "checkpoint": "runs/adapt-1/step_00000020", "of_step": 20, "blocked_seconds": 0.1})
    assert lines(capfd) == [
        "run directory: runs/adapt-1",
        "adapt: starting workers",
        "adapt: starting workers",
        "adapt: training, step 1 of 100",
        "adapt: training, step 20 of 100, loss 0.2000, 500 tokens/s, 0:01:16 left",
        "adapt: training, step 20 of 100, loss 0.2000, held-out 1.235 bits/byte, 500 tokens/s, 0:01:16 left",
        "adapt: training, step 20 of 100, loss 0.2000, held-out 1.235 bits/byte, 500 tokens/s, 0:01:16 left, "
        "saved step_00000020",
    ]


def test_the_stage_of_a_run_is_its_block_size_and_how_far_annealing_is():
    status = RunStatus("adapt", 100)
    status.update(metrics(10, annealing_ratio=0.25, block_tokens=2))
    assert status.stage == "blocks of 2 annealing 25%"
    status.update(metrics(20, annealing_ratio=1.0, block_tokens=4))
    assert status.stage == "blocks of 4"
    status.update(metrics(30))
    assert status.stage == "training"


def test_a_resumed_run_estimates_the_time_left_from_this_session_only(clock):
    run = RunLines(RunStatus("adapt", 1000), lambda kind, status: None, clock)
    run.on_event(metrics(900))
    clock.seconds = 50.0
    run.on_event(metrics(910))
    assert run.status.seconds_left == 450.0


def test_a_long_run_prints_a_line_a_minute(clock):
    kinds = []
    run = RunLines(RunStatus("adapt", 10_000), lambda kind, status: kinds.append(kind), clock)
    for step in range(1, 1801):
        clock.seconds += 1
        run.on_event({"step": step, "tokens_per_second": 1.0})
    assert 59 + 19 < len(kinds) < 59 + 23


def test_a_json_log_has_the_fields_of_a_run_on_each_line(json_log, capfd):
    with run_display("adapt", 100) as run:
        run.begin("runs/adapt-1")
        run.on_event({"step": 20, "validation": {"bits_per_byte": 1.5}})
    message, start, validation = map(json.loads, lines(capfd))
    assert message["event"] == "message" and message["message"] == "run directory: runs/adapt-1"
    assert start["event"] == "start" and start["stage"] == "starting workers"
    assert validation.pop("time").endswith("+00:00")
    assert validation == {
        "event": "validation",
        "run": "adapt",
        "steps": 100,
        "stage": "training",
        "step": 20,
        "loss": None,
        "bits_per_byte": 1.5,
        "tokens_per_second": None,
        "seconds_left": None,
        "checkpoint": None,
    }


def test_warnings_of_the_library_are_printed_as_messages_with_the_flags_of_the_command_line(capfd):
    with warnings_printed(lambda: {"held_out": "--held-out"}):
        warnings.warn("the split is empty with held_out=0.01; raise `held_out`", stacklevel=1)
        logging.getLogger("dlm_ray.training.setup").warning("nothing is %s", "validated")
    assert lines(capfd) == [
        "warning: the split is empty with --held-out 0.01; raise --held-out",
        "warning: nothing is validated",
    ]
