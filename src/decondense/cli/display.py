"""The one progress display: bars on a terminal; in a log file, CI or a notebook a plain line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

    from decondense.cli.console import Console
    from decondense.studies import CellState

EVERY = 30.0
"""Seconds between two lines where there is no terminal; work of hours gets fewer, one per sixtieth of its time."""


@dataclass
class _Item:
    """One thing that is under way."""

    name: str
    done: int
    total: int | None
    note: str
    began: float
    first: int
    """What was done already when it began: a resumed run."""
    bar: TaskID | None = None

    def left(self, now: float) -> float | None:
        """Seconds to its end at the pace since it began; None while there is no pace."""
        if not self.total or self.done <= self.first:
            return None
        return (now - self.began) * (self.total - self.done) / (self.done - self.first)


class Display:
    """Shows the progress of several things at once. A context manager.

    On a terminal, each thing in progress has a bar. Elsewhere, each has one line every ``every`` seconds, with what is
    done, the elapsed time and an estimate of what is left; also while a single step takes longer than that. In both
    cases :meth:`finish` prints a line when a thing has ended.

    Args:
        console: Where to print.
        every: Seconds between two lines; None: :data:`EVERY`.
        clock: Seconds.
    """

    def __init__(
        self, console: Console, *, every: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich import progress

        self.console = console
        self._clock = clock
        self._every = EVERY if every is None else every
        self._items: dict[Hashable, _Item] = {}
        self._finished: set[Hashable] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=30),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._bars.start()
        if not self.console.is_terminal:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._bars.stop()

    def update(self, key: Hashable, name: str, done: int = 0, total: int | None = None, note: str = "") -> None:
        """Update the progress of ``key`` to ``done`` of ``total`` (None: unknown); the first call starts it."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                item = self._items[key] = _Item(name, done, total, note, self._clock(), done)
                item.bar = self._bars.add_task(name, total=total, note=note)
            item.done, item.total, item.note = done, total, note
            assert item.bar is not None
            self._bars.update(item.bar, completed=done, total=total, note=note)

    def drop(self, key: Hashable) -> None:
        """Remove a thing without printing anything."""
        with self._lock:
            item = self._items.pop(key, None)
            if item is not None and item.bar is not None:
                self._bars.remove_task(item.bar)

    def finish(self, key: Hashable, name: str, note: str) -> None:
        """Print that a thing has ended; once for each ``key``."""
        self.drop(key)
        if key not in self._finished:
            self._finished.add(key)
            self._print(f"{name}: {note}" if note else name)

    def active(self) -> list[Hashable]:
        """The keys of the things in progress."""
        return list(self._items)

    def _run(self) -> None:
        began = self._clock()
        while not self._stop.wait(max(self._every, (self._clock() - began) / 60)):
            with self._lock:
                lines = self._lines()
            try:
                for line in lines:
                    self._print(line)
            except (OSError, ValueError):  # the reader of the log is gone; the command itself will notice
                return

    def _lines(self) -> list[str]:
        from decondense.formatting import duration

        now = self._clock()
        lines = []
        for item in self._items.values():
            parts = [f"{item.done:,}/{item.total:,}"] if item.total else []
            parts += [item.note] if item.note else []
            parts.append(duration(now - item.began))
            left = item.left(now)
            parts += [] if left is None else [f"about {duration(left)} left"]
            lines.append(f"{item.name}: {', '.join(parts)}")
        return lines

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class StudyDisplay:
    """A :class:`decondense.studies.runner.Watcher` that shows a study on a display."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._seeds: set[int] = set()

    def corpus(self, what: str, done: int, total: int) -> None:
        """The text is being prepared."""
        if done >= total:
            self._display.finish(what, what, f"{done:,}/{total:,}")
        else:
            self._display.update(what, what, done, total)

    def cells(self, states: list[CellState]) -> None:
        """The states of the cells have changed."""
        seeds = {state.seed for state in states if state.kind == "cell"}
        for seed in sorted(seeds - self._seeds) if self._seeds else ():
            self._display.finish(("seed", seed), f"seed {seed}", "added, because not every arm is decided")
        self._seeds |= seeds
        ended = sum(state.status in ("finished", "failed") for state in states)
        for state in states:
            key, name = (state.arm, state.seed), f"{state.arm}, seed {state.seed}"
            loss = "" if state.loss is None else f"loss {state.loss:.3f}"
            if state.status in ("finished", "failed"):
                # a start that is evaluated as it is has no steps: it is one thing, done or not
                steps = f"step {state.step:,}/{state.steps:,}" if state.steps else ""
                parts = [state.status] if state.status == "failed" else [part for part in (steps, loss) if part]
                self._display.finish(key, name, ", ".join(parts) or state.status)
            elif state.status != "waiting":
                self._display.update(key, name, state.step, state.steps or None, loss)
        if ended < len(states):
            self._display.update("runs", "runs", ended, len(states))
        else:
            self._display.drop("runs")


class EvaluationDisplay:
    """A :class:`decondense.evaluate.Progress` that shows one task after the other on a display."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def __call__(self, task: str, what: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` requests of ``task`` (``""``: of loading the model) are complete."""
        name = task or "loading the harness and the model"
        if what == "damaged":
            self._display.finish((task, what), task, "its file of results is damaged or unreadable: scored again")
            return
        if what in ("done", "kept", "failed"):
            words = {"done": f"{done:,} items", "kept": "kept from before", "failed": "failed"}[what]
            self._display.finish(name, name, words)
            return
        for other in self._display.active():
            if other != name:
                self._display.drop(other)
        self._display.update(name, name, done, total)
