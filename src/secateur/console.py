"""The one place for logging and progress: everything for people goes to stderr, so stdout stays for results."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

log = logging.getLogger("secateur")
stderr = Console(stderr=True)


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


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write the log to ``path`` while the context lasts."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` under a progress bar on stderr (drawn on terminals only)."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def progress(description: str, total: int | None, tokens: int | None = None) -> Iterator[Advance]:
    """A progress bar on stderr; call the yielded object once per finished piece."""
    bar = Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=total, note="")
        yield Advance(bar, task)


class Advance:
    """Moves one progress bar on; ``note`` shows a few words (a loss, a name) beside it."""

    def __init__(self, bar: Progress, task: object) -> None:
        self._bar, self._task = bar, task

    def __call__(self, steps: int = 1, note: str | None = None) -> None:
        fields = {} if note is None else {"note": note}
        self._bar.update(self._task, advance=steps, **fields)  # type: ignore[arg-type]
