"""What people and logs are told while it runs, and how much memory there is."""

from __future__ import annotations

import json
import logging
import os

import pytest

from secateur import console, memory
from secateur.files import human_seconds
from secateur.runlog import attempts, log_files, read_events, stage_seconds


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(console.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def plain(monkeypatch, caplog):
    """What a log of stderr would say: it is no terminal, and sizes of memory are round."""
    monkeypatch.setattr(console, "memory_now", lambda: 2 * 2**30)
    monkeypatch.setattr(console, "memory_peak", lambda: 3 * 2**30)
    caplog.set_level(logging.INFO, "secateur")
    monkeypatch.setattr(console.log, "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "secateur"]


def test_a_log_shows_life_every_half_minute(clock, plain):
    with console.progress("Forward over the blocks", 32, unit="block", tokens=8192) as advance:
        for _ in range(11):
            for window in range(4):
                advance.within(window + 1, 4)
                clock.now += 1
            advance()
        advance.within(2, 4)
    lines = plain()
    assert len(lines) == 1
    assert lines[0].startswith("Forward over the blocks: block 8 of 32, 3 of 4 windows, ")
    clock.now += 30
    with console.progress("Forward over the blocks", 32, unit="block", tokens=8192, done=11) as advance:
        clock.now += 32
        advance()
    # A block in 32 s: 20 are left, and 8192 tokens would need 32 of them.
    assert plain()[
        1
    ] == "Forward over the blocks: block 13 of 32, 8.0 tokens/s, 11 min left, 2.0 GiB now, 3.0 GiB at most".replace(
        "8.0", "8"
    )


def test_short_work_says_nothing(clock, plain):
    for _ in console.track(range(20), "Counting"):
        clock.now += 1
    assert plain() == []


def test_work_of_unknown_length(clock, plain):
    with console.progress("Reading", None) as advance:
        clock.now += 31
        advance(note="page 3")
    assert plain() == ["Reading: 1, page 3"]


def test_a_terminal_has_its_bar_and_the_log_its_event(clock, plain, tmp_path, monkeypatch):
    from rich.console import Console

    screen = Console(force_terminal=True, file=(tmp_path / "screen").open("w"), width=200)
    monkeypatch.setattr(console, "stderr", screen)
    with log_files(tmp_path), console.progress("Backward over the blocks", 4, unit="block") as advance:
        clock.now += 31
        advance()
    assert plain() == []
    events = read_events(tmp_path / "log.jsonl")
    assert [line["event"] for line in events] == ["part started", "block finished", "progress", "part finished"]
    assert events[1] | {"time": ""} == {
        "time": "", "level": "INFO", "message": "block finished", "event": "block finished", "part": "Backward over the blocks",
        "finished": 1, "of": 4, "seconds": 31.0, "tokens": 0, "memory": 2 * 2**30, "peak": 3 * 2**30,
    }  # fmt: skip


def test_the_log_outlives_a_torn_line(tmp_path):
    for attempt in range(2):
        with log_files(tmp_path):
            console.event("run started", attempt=attempt)
            console.log.info("A sentence with %s.", "words")
        with (tmp_path / "log.jsonl").open("a") as stream:
            stream.write('{"time": "2026-')
    whole = read_events(tmp_path / "log.jsonl")
    assert [line["message"] for line in whole] == ["run started", "A sentence with words."] * 2
    assert "A sentence" in (tmp_path / "log.txt").read_text()
    assert "run started" not in (tmp_path / "log.txt").read_text()
    console.event("nobody listens")
    for line in (tmp_path / "log.jsonl").read_text().splitlines()[:2]:
        json.loads(line)


def line(second: float, event: str, **fields) -> dict:
    return {"time": f"2026-01-01T00:00:{second:06.3f}+00:00", "event": event, **fields}


def test_what_became_of_each_attempt():
    events = [
        line(0, "run started"),
        line(1, "stage started", stage="choosing"),
        line(5, "block finished"),
        line(20, "run started"),
        line(21, "stage started", stage="choosing"),
        line(23, "stage finished", stage="choosing"),
        line(23, "stage started", stage="writing"),
        line(24, "run ended", how="interrupted"),
        line(30, "run started"),
        line(31, "stage started", stage="writing"),
        line(32.5, "stage finished", stage="writing"),
    ]
    found = attempts(events)
    assert [attempt["end"] for attempt in found] == ["killed", "interrupted", "finished"]
    assert [attempt["seconds"] for attempt in found[:2]] == [5, 4]
    assert stage_seconds(events) == {"choosing": 6.0, "writing": 2.5}


@pytest.mark.parametrize(("seconds", "words"), [(3.2, "3 s"), (89, "89 s"), (250, "4 min"), (7500, "2 h 5 min")])
def test_seconds_in_words(seconds, words):
    assert human_seconds(seconds) == words


# -- memory


def test_memory_now_and_at_most():
    ballast = bytearray(os.urandom(1)) * (64 << 20)
    assert len(ballast) < memory.memory_now() <= memory.memory_peak()
    available = memory.memory_available()
    assert available is None or available > 0


def test_without_proc_the_system_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert memory.memory_now() == memory.memory_peak() > 1 << 20
    assert memory.memory_available() is None


def cgroup(folder, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(str(value))


def test_limits_of_control_groups(tmp_path, monkeypatch):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    8000 kB\n")
    assert memory.memory_available() == 8000 * 1024
    # version 2, alone: the group's own limit is none, the one around it binds
    (proc / "self" / "cgroup").write_text("0::/slice/job\n")
    cgroup(
        groups / "slice",
        memory__max=6_000_000,
        memory__current=5_000_000,
        memory__stat="anon 1\ninactive_file 500000\n",
    )
    cgroup(groups / "slice" / "job", memory__max="max", memory__current=4_000_000)
    assert memory.memory_available() == 1_500_000
    # in a container the path is the host's, and the limit stands on top
    (proc / "self" / "cgroup").write_text("0::/of/the/host\n")
    cgroup(groups, memory__max=700_000, memory__current=100_000)
    assert memory.memory_available() == 600_000
    # version 1
    (proc / "self" / "cgroup").write_text("4:memory:/job\n0::/\n")
    limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
    cgroup(groups / "memory" / "job", **{limit: 300_000, usage: 290_000, "memory.stat": "total_inactive_file 40000\n"})
    assert memory.memory_available() == 50_000
