"""What a person sees while a model trains."""

import io
import logging
import sys

import pytest
from rich.console import Console

from rwkv_rlhf.training.held_out_lines import held_out_line
from rwkv_rlhf.training.pace import Pace
from rwkv_rlhf.training.screen import Bar, Spoken, say_pace

RECORD = {"loss": 0.8, "accuracy": 0.97, "lr": 1e-4, "grad_norm": 1.25, "tokens_per_s": 1100.0, "memory": 4.2}


class Clock:
    """One second a look."""

    now = 0.0

    def __call__(self):
        return self.now


def stepped(total, steps, speed=1100.0):
    """A pace after some steps of two seconds each."""
    clock = Clock()
    pace = Pace(total, clock)
    for step in range(1, steps + 1):
        clock.now += 2.0
        pace.step(RECORD | {"step": step, "tokens_per_s": 1.0 if step == 1 else speed})
    return pace


def test_a_pace_by_hand():
    """If this breaks, the time that is left counts compiling, or is that of another number of steps."""
    pace = stepped(120, 57)
    assert (pace.seconds_left, pace.tokens_per_s, pace.seconds) == (126.0, 1100.0, 114.0)
    assert stepped(10, 1).seconds_left is None and stepped(10, 10).seconds_left == 0


@pytest.mark.parametrize("width", range(60, 201, 7))
def test_the_bar_fits_the_terminal(width):
    """If this breaks, the bar breaks into two lines and fills the screen, or leaves out how far the run is."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = Bar(stepped(120, 57), 40.0, console)
    console.print(bar.line(RECORD))
    (text,) = console.file.getvalue().splitlines()
    assert len(text) <= width and "step 57/120" in text and "2 min left" in text
    if width >= 80:
        assert "loss 0.80" in text
    if width >= 180:
        for part in ("pass 1.4", "mean 0.80", "acc 0.97", "lr 1.0e-04", "grad 1.2", "1.1k tok/s", "4.2 GiB"):
            assert part in text


def test_log_lines_stand_above_the_bar(monkeypatch):
    """If this breaks, a line of the log is torn by the bar, or goes nowhere once the bar is gone."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        console = Console(width=100, file=screen, force_terminal=True, color_system=None)
        bar = Bar(stepped(120, 57), 40.0, console)
        bar.on_train_start(None, None)
        bar.record(RECORD)
        assert handler.stream is not screen
        root.warning("a line of the log")
        bar.stop()
        assert handler.stream is screen and sys.stderr is screen
        assert "a line of the log\n" in screen.getvalue()
    finally:
        root.removeHandler(handler)


def test_without_a_terminal_the_first_and_the_last_step_are_said(caplog):
    """If this breaks, a log file does not say where a run began, how far it is, or that it came to its end."""
    caplog.set_level(logging.INFO)
    clock = Clock()
    pace = Pace(450, clock)
    spoken = Spoken(pace)
    for step in range(1, 451):
        clock.now += 1.0
        pace.step(RECORD | {"step": step})
        spoken(RECORD | {"step": step})
        say_pace(pace)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("step 1/450 (0%): loss 0.8")
    assert said[1] == "the other 447 steps take about 7 min (1 s each)"
    assert said[-1].startswith("step 450/450 (100%), 0 s left: loss 0.8") and len(said) == 3


def test_held_out_figures_are_said_as_a_change():
    """If this breaks, nobody sees at a glance whether training helps."""
    before = {"loss": 9.5, "accuracy": 0.5, "reward_margin": 0.0, "pairs": 9}
    after = {"loss": 9.0, "accuracy": 0.958, "reward_margin": 1.25, "pairs": 9}
    text = "held out: accuracy 0.50 -> 0.96, loss 9.50 -> 9.00, reward_margin 0.00 -> 1.25"
    assert held_out_line(after, before) == text
    assert held_out_line(after, None).startswith("held out: accuracy 0.958, loss 9, ")
    sampled = {"reward": 0.25, "loss": -0.25, "entropy": 1.5}
    assert held_out_line(sampled, None) == "held out: reward 0.25, entropy 1.5", "the same number twice"
