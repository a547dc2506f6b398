"""The one place for logging and progress: everything for people goes to stderr, so stdout stays for results."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from secateur.files import human_bytes, human_count, human_seconds
from secateur.memory import memory_now, memory_peak
from secateur.runlog import event, log, say

T = TypeVar("T")

stderr = Console(stderr=True)

SHOW_EVERY = 0.1
"""Seconds between two looks of a bar at where it is: asking the system for the memory takes its time too."""
PLAIN_EVERY = 30.0
"""Seconds between two plain lines about the same piece of work."""


class _ConsoleHandler(logging.Handler):
    """Log lines as plain sentences above any progress bar; warnings stand out. Lines are not broken: files hold them too."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "bold yellow" if record.levelno >= logging.WARNING else None
        stderr.print(record.getMessage(), style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def setup(verbose: bool = False) -> None:
    """Send Secateur's log to stderr, and keep the libraries underneath from talking to the user."""
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        log.addHandler(_ConsoleHandler())
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False
    warnings.filterwarnings("ignore")  # the process is ours here; a library's user keeps their own filters
    quiet_libraries()


def quiet_libraries() -> None:
    """Silence the chatter, warnings and progress bars of the libraries below us."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` under a progress bar on stderr (drawn on terminals only)."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def progress(
    description: str, total: int | None, unit: str = "step", tokens: int = 0, done: int = 0
) -> Iterator[Advance]:
    """A progress bar on stderr; call the yielded object once per finished piece.

    Where stderr is not a terminal a plain line appears every half minute instead, so that a log shows life; the run
    folder's log has it either way.

    Args:
        unit: what is counted. Of a ``block`` the log says seconds and memory, and people see windows, tokens a second and
            memory too.
        tokens: how many tokens go through each block, for tokens a second.
        done: pieces that an earlier attempt has finished.
    """
    bar = Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=28),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
    event("part started", part=description, total=total, done=done)
    with bar:
        advance = Advance(bar, description, total, unit, tokens, done)
        yield advance
    event("part finished", part=description, total=total, done=advance.done)


class Advance:
    """Moves one progress bar on and says where it is; see ``progress``.

    Attributes:
        done: pieces finished, those of an earlier attempt included.
    """

    def __init__(self, bar: Progress, description: str, total: int | None, unit: str, tokens: int, done: int) -> None:
        self.done = done
        self._bar, self._description, self._total, self._unit, self._tokens = bar, description, total, unit, tokens
        self._first, self._part, self._note = done, "", ""
        self._share, self._shown = 0.0, 0.0
        self._started = self._piece_started = self._said = time.monotonic()
        self._task = bar.add_task(description, total=total, completed=done, state="")
        self._show()

    def __call__(self, steps: int = 1, note: str | None = None) -> None:
        """``steps`` more pieces are finished; ``note`` is a few words (a loss, a name) beside the bar."""
        self.done += steps
        self._part, self._share = "", 0.0
        self._note = self._note if note is None else note
        if self._unit == "block":
            seconds = time.monotonic() - self._piece_started
            event("block finished", part=self._description, finished=self.done, of=self._total,
                  seconds=round(seconds, 3), tokens=self._tokens, memory=memory_now(), peak=memory_peak())  # fmt: skip
        self._piece_started = time.monotonic()
        self._show()

    def within(self, finished: int, of: int, things: str = "windows") -> None:
        """So many windows of the present piece are through."""
        self._part, self._share = f"{finished} of {of} {things}", finished / of
        self._show(at_once=False)

    def _show(self, at_once: bool = True) -> None:
        now = time.monotonic()
        if not at_once and now - self._shown < SHOW_EVERY:
            return
        self._shown = now
        self._bar.update(self._task, completed=self.done, state=" · ".join(self.words()))
        if time.monotonic() - self._said >= PLAIN_EVERY:
            self._said = time.monotonic()
            self._say(f"{self._description}: {', '.join(self.words())}")

    def _say(self, line: str) -> None:
        fields = dict(
            part=self._description, finished=self.done, of=self._total, memory=memory_now(), peak=memory_peak()
        )
        if stderr.is_terminal:
            event("progress", line=line, **fields)  # the bar says it already
        else:
            say(line, "progress", **fields)

    def words(self) -> list[str]:
        """Where it stands, in a few words each."""
        words = [self._place(), self._part, self._speed(), self._time_left()]
        if self._unit == "block":
            words.append(f"{human_bytes(memory_now())} now, {human_bytes(memory_peak())} at most")
        return [word for word in [*words, self._note] if word]

    def _place(self) -> str:
        if self._unit == "block":
            at = self.done + 1 if self._total is None else min(self.done + 1, self._total)
            return f"block {at} of {self._total or '?'}"
        return f"{self.done} of {self._total}" if self._total is not None else str(self.done)

    def _pieces(self) -> float:
        """What this attempt has done, the windows of the present piece counted in."""
        return self.done - self._first + self._share

    def _speed(self) -> str:
        """Tokens that have gone all the way, a second: as for a plain forward, whatever number of blocks it has."""
        seconds = time.monotonic() - self._started
        if not self._tokens or not self._total or not self._pieces() or seconds <= 0:
            return ""
        return f"{human_count(self._tokens * self._pieces() / self._total / seconds)} tokens/s"

    def _time_left(self) -> str:
        if self._total is None or not self._pieces():
            return ""
        pieces = self._total - self.done - self._share
        return f"{human_seconds((time.monotonic() - self._started) / self._pieces() * pieces)} left"
