"""The progress bar of a sweep: a line that is redrawn on a terminal, lines now and then where stderr is a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TextIO

from moesaic.bench.plan import Row

REDRAW_INTERVAL_S = 0.2
LOG_INTERVAL_S = 10.0
"""Seconds between progress lines where stderr is a file."""
RATE_SPAN_S = 30.0
"""About how far back the rate looks: groups differ in cost, so old ones say little about the rest."""


class _LogFile:
    """Gives each redrawing of tqdm's line as a line of its own, for a stderr that is a file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.encoding = file.encoding

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()


class Progress:
    """One bar over all stages, counted in model-steps (optimiser steps times the models that take them)."""

    def __init__(self, *, enabled: bool) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        interval = REDRAW_INTERVAL_S if terminal else LOG_INTERVAL_S
        self._file = sys.stderr if terminal else _LogFile(sys.stderr)
        self._failed = 0
        self._base = 0  # model-steps of the finished groups
        self._bar = tqdm(
            total=0,
            delay=1e-9,  # nothing is drawn before the first stage says its total
            unit=" model-steps",
            unit_scale=True,
            disable=not enabled,
            file=self._file,
            mininterval=interval,
            smoothing=min(1.0, 2 * interval / RATE_SPAN_S),  # the rate is an exponential mean over the redrawings
            miniters=1,
            dynamic_ncols=terminal,
            ncols=None if terminal else 120,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def stage(self, name: str) -> None:
        """Names what is under way."""
        self._bar.set_description(name, refresh=False)

    def prepare(self, words: str, work: Callable[[], None]) -> None:
        """Does ``work`` before training, outside the rate and the elapsed time."""
        if not self._bar.disable:
            self._bar.clear()  # tqdm's own way to write would draw a bar that has no total yet
            print(words, file=sys.stderr, flush=True)
        start = time.time()
        work()
        if not self._bar.disable:
            self._bar.start_t += time.time() - start
            self._bar.last_print_t = time.time()

    def extend(self, total: int, done: int) -> None:
        """Adds a stage of ``total`` model-steps; ``done`` of them an earlier sweep's, not counted for the rate."""
        self._base += done
        if not self._bar.disable:
            self._bar.total += total
            self._bar.initial += done
            self._bar.n = self._bar.last_print_n = self._base
            self._bar.refresh()

    def advance(self, models: int) -> Callable[[int, float], None]:
        """What a trainer of ``models`` models calls with its steps since the last call and their mean loss."""

        def on_progress(steps: int, loss: float) -> None:
            failures = f", {self._failed} failed" if self._failed else ""
            self._bar.set_postfix_str(f"loss {loss:.4g}{failures}", refresh=False)
            self._bar.update(steps * models)

        return on_progress

    def group_done(self, steps: int, failed: Sequence[Row]) -> None:
        """Counts a finished group of so many model-steps, and tells of its runs that failed."""
        self._base += steps
        self._failed += len(failed)
        for row in failed:
            self._bar.write(f"failed: run {str(row['run_key'])[:12]}: {row['error']}", file=self._file)
        self._move(self._base)

    def group_failed(self) -> None:
        """Takes back the steps of a group that is trained again."""
        self._move(self._base)

    def _move(self, to: int) -> None:
        self._bar.update(to - self._bar.n)
