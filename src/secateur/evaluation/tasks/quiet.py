"""lm-eval without its chatter, and without the means to run what a task file says."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from secateur.errors import TaskError, reason_of


class _Heard(logging.Handler):
    """Keeps what says that a request was too long; the rest of lm-eval's warnings are about how it was called."""

    def __init__(self, cut: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.cut = cut

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "runcating" in message:
            self.cut.append(message)


@contextmanager
def quiet(trusted: bool) -> Iterator[list[str]]:
    """lm-eval without its bars, warnings and prints, and with templates that can reach no code unless ``trusted``.

    Yields the warnings about requests that were cut.
    """
    cut: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_loggers(_Heard(cut)))
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(_bars_off())
        # The bootstrap would start a process for every core.
        stack.enter_context(_replaced(os.environ, "DISABLE_MULTIPROC", "1"))
        lm_eval = _lm_eval()
        # It asks the machine about itself with half a dozen commands, and nothing here reads what they say.
        stack.enter_context(_replaced(vars(lm_eval.evaluator), "add_env_info", lambda storage: None))
        stack.enter_context(_replaced(vars(lm_eval.evaluator), "get_git_commit_hash", lambda: None))
        if not trusted:
            stack.enter_context(_replaced(vars(lm_eval.utils), "env", _sandbox()))
        yield cut


def _lm_eval() -> Any:
    try:
        import lm_eval.evaluator
    except ImportError as error:
        raise TaskError(
            f"--tasks needs lm-eval, which is not here ({reason_of(error)}); pip install 'lm-eval>=0.4.13,<0.5'"
        ) from error
    return lm_eval


@contextmanager
def _replaced(where: Any, key: str, value: Any) -> Iterator[None]:
    """``where[key]`` is ``value`` for a while."""
    absent = object()
    before = where.get(key, absent)
    where[key] = value
    try:
        yield
    finally:
        if before is absent:
            del where[key]
        else:
            where[key] = before


def _sandbox() -> Any:
    """lm-eval's environment for templates, sandboxed."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval.utils import env

    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(env.filters)
    return sandbox


@contextmanager
def _loggers(heard: logging.Handler) -> Iterator[None]:
    own = logging.getLogger("lm_eval")
    before = own.level, own.propagate
    others = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub", "evaluate", "fsspec")}
    own.setLevel(logging.WARNING)
    own.propagate = False
    own.addHandler(heard)
    for name in others:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.removeHandler(heard)
        own.setLevel(before[0])
        own.propagate = before[1]
        for name, level in others.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _bars_off() -> Iterator[None]:
    from tqdm import tqdm

    begin = tqdm.__init__

    def hidden(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **(named | {"disable": True}))

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = begin
