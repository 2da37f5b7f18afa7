"""What is shown of a fit: in a terminal, in a notebook, and where neither is."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from backbones import Plain
from conftest import texture
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector import progress_bars
from patchsvdd_fast.detector.progress_bars import FitDisplay, Pace, display
from patchsvdd_fast.training.record import LevelMetrics, Quality, TrainingStep
from processes import Clock, run_script


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(100.0)
    monkeypatch.setattr(progress_bars, "time", clock)
    return clock


def console_of(kind, **options):
    terminal, notebook = kind == "terminal", kind == "notebook"
    width = {"width": 150, "force_terminal": terminal, "force_jupyter": notebook}
    return Console(file=io.StringIO(), **width, **options)


def test_without_a_terminal_there_is_a_line_a_minute_at_most(clock):
    console = console_of("log")
    with display(console) as shown:
        for second in range(200):
            clock.now = 100.0 + second
            shown.phase("encoding", second / 200, 200.0 - second)
    assert console.file.getvalue().splitlines() == [
        "encoding  30%  2:20 to go",
        "encoding  60%  1:20 to go",
        "encoding  90%  0:20 to go",
    ]


def test_a_notebook_gets_a_line_for_each_phase(clock):
    console = console_of("notebook")
    with display(console) as shown:
        for name in ("reading", "encoding"):
            for share in (0.0, 0.5, 1.0):
                clock.now += 0.4
                shown.phase(name, share, None if name == "reading" else 60 * (1 - share))
        shown.say("done")
    lines = console.file.getvalue().split("\n")
    seen = [line.rpartition("\r")[2].rstrip() for line in lines]  # as a notebook overwrites them
    assert seen == ["reading  100%", "encoding  100%", "done", ""]
    assert "encoding  0%  1:00 to go" in lines[1]


def test_a_terminal_gets_a_bar_for_each_phase():
    console = console_of("terminal")
    with display(console) as shown:
        shown.phase("reading", 1.0, None)
        shown.phase("encoding", 0.25, 90.0)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    last = [" ".join(line.split()) for line in text.splitlines()[-2:]]
    assert re.fullmatch(r"reading \S+ 100%", last[0])
    assert re.fullmatch(r"encoding \S+.* 25% 1:30 to go", last[1])


def test_a_step_is_shown_with_its_figures(clock):
    console = console_of("log")
    with display(console) as shown:
        fit = FitDisplay(shown)
        for number in range(1, 13):
            clock.now += 10
            fit.on_progress("training", number / 100, 100.0 - number)
            levels = {64: LevelMetrics(0.1, 0.02, 2.0, 0.25)}
            quality = Quality(90.0, 60.0) if number == 5 else None
            step = TrainingStep(number, 100, 1.5, 1e-4, 9.0, 1.0, levels, quality)
            fit.on_step(step)
    figures = "loss 1.5  K64 right 25% spread 2e-02  defects 80.0"
    assert console.file.getvalue().splitlines() == [
        f"training  6%  1:34 to go  6/100  {figures}",
        "100 steps, about 88 seconds to go in all",
    ]


def test_pace(clock):
    pace = Pace()
    assert pace.left(0.2) is None  # such as what an earlier run has done
    clock.now += 10
    assert pace.left(0.4) == pytest.approx(30)
    assert pace.left(1.0) == 0


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return np.stack([texture(rng, 96) for _ in range(6)])


def test_fit_and_score_show_their_progress_if_asked_to(images, capsys, monkeypatch):
    monkeypatch.setattr(progress_bars, "_LINE_EVERY", 0.0)
    detector = PatchSVDD(encoder=Plain(), image_size=96)
    told = []
    detector.fit(images, progress=True, on_progress=lambda name, *_: told.append(name))
    shown = capsys.readouterr()
    names = list(dict.fromkeys(told))
    assert "reading" in names and "setting thresholds" in names
    assert all(f"{name}  100%" in shown.out for name in names)
    detector.score(images[:2], progress=True)
    shown = capsys.readouterr()
    assert all(f"{name}  100%" in shown.out for name in ("reading", "encoding", "searching"))
    detector.fit(images)
    detector.score(images[:2])
    assert capsys.readouterr() == ("", "")


def test_changes_of_banks_show_their_progress_if_asked_to(images, capsys, monkeypatch):
    monkeypatch.setattr(progress_bars, "_LINE_EVERY", 0.0)
    detector = PatchSVDD(encoder=Plain(), image_size=96).fit(images)
    other = detector.refit(images[:4])
    capsys.readouterr()
    after = ("calibrating", "setting thresholds")
    for change, names in (
        (lambda **how: detector.add(images[:1], **how), ("reading", "encoding", *after)),
        (lambda **how: detector.remove([0], **how), after),
        (lambda **how: detector.merge(other, **how), after),
        (
            lambda **how: detector.refit(images[:4], **how),
            ("reading", "estimating", "encoding", "filling banks", *after),
        ),
    ):
        change()
        assert capsys.readouterr() == ("", "")
        change(progress=True)
        shown = capsys.readouterr().out
        found = [line.split("  ")[0] for line in shown.splitlines() if "  100%" in line]
        assert tuple(dict.fromkeys(found)) == names


def test_only_the_first_of_several_processes_shows_anything(images, capsys, monkeypatch):
    monkeypatch.setattr(progress_bars, "_LINE_EVERY", 0.0)
    with progress_bars.fit_shown(True, None, None) as (_, on_progress):
        on_progress("reading", 0.5, None)
    assert "reading" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    with progress_bars.fit_shown(True, None, None) as told:
        assert told == (None, None)


def test_an_import_prints_nothing():
    code = "import patchsvdd_fast.detector.patch_svdd, patchsvdd_fast.cli.app"
    done = run_script("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
