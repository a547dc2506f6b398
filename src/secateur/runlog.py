"""The log that a run folder keeps: sentences in ``log.txt``, the same and every event as JSON lines in ``log.jsonl``.

A run that goes on appends to both. What killed it may have torn the last line, so reading passes over what is not whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

TEXT_LOG, EVENT_LOG = "log.txt", "log.jsonl"

log = logging.getLogger("secateur")
_events = logging.getLogger("secateur.events")
_events.propagate = False
_events.setLevel(logging.INFO)


def event(name: str, **fields: Any) -> None:
    """Write an event and what belongs to it to the JSON-lines log of the run at work, if there is one; people do not see it."""
    _events.info(name, extra={"event": name, "fields": fields})


def say(sentence: str, name: str, **fields: Any) -> None:
    """Say ``sentence`` to people; the JSON-lines log has it as an event with its fields."""
    log.info("%s", sentence, extra={"event": name, "fields": fields})


class _LastingHandler(logging.FileHandler):
    """Appends to a file, line by line. A disk that is full is said by the work itself, not once more by its log."""

    def __init__(self, path: Path) -> None:
        _end_torn_line(path)
        super().__init__(path, encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            self.stream = None


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {"time": now(), "level": record.levelname, "message": record.getMessage()}
        if hasattr(record, "event"):
            content |= {"event": record.event, **getattr(record, "fields", {})}
        return json.dumps(content, ensure_ascii=False, default=str)


@contextmanager
def log_files(folder: Path) -> Iterator[None]:
    """Also write the log to ``folder`` while the context lasts."""
    text, lines = _LastingHandler(folder / TEXT_LOG), _LastingHandler(folder / EVENT_LOG)
    text.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    lines.setFormatter(_JsonLines())
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    for logger, handler in ((log, text), (log, lines), (_events, lines)):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, handler in ((log, text), (log, lines), (_events, lines)):
            logger.removeHandler(handler)
        text.close()
        lines.close()


def read_events(file: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSON-lines log."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and "time" in content:
            found.append(content)
    return found


def attempts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each attempt at a run that is just being finished.

    Returns:
        for each when it started, when it wrote its last line, and how it ended; one that wrote no end was killed.
    """
    found: list[dict[str, Any]] = []
    for line in events:
        if line.get("event") == "run started":
            found.append({"started": line["time"], "ended": line["time"], "end": "killed"})
        if found:
            found[-1]["ended"] = line["time"]
            if line.get("event") == "run ended":
                found[-1]["end"] = line["how"]
    if found:
        found[-1] |= {"ended": now(), "end": "finished"}
    for attempt in found:
        attempt["seconds"] = round(seconds_between(attempt["started"], attempt["ended"]), 2)
    return found


def stage_seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """How long each stage took over all attempts; one that was killed took until the last line of its attempt."""
    found: dict[str, float] = {}
    running: dict[str, str] = {}
    last = ""
    for line in events:
        kind = line.get("event")
        if kind == "stage started":
            running[line["stage"]] = line["time"]
        elif kind == "stage finished" or (kind == "run started" and running):
            ended = line["time"] if kind == "stage finished" else last
            for name in [line["stage"]] if kind == "stage finished" else list(running):
                found[name] = round(found.get(name, 0.0) + seconds_between(running.pop(name), ended), 3)
        last = line["time"]
    return found


def now() -> str:
    """The time as it is written everywhere: ISO 8601 with its zone, to the millisecond."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def seconds_between(start: str, end: str) -> float:
    return max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())


def _end_torn_line(path: Path) -> None:
    """Begin a new line where a kill left half of one."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as stream:
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
