"""What a run has to share with an unfinished one to go on with it: the same identity, the same settings of the machine."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.placement import HERE, Placement
from secateur.console import log
from secateur.errors import OutputError
from secateur.files import write_json

STARTED, FINISHED, PLAN = "started.json", "finished.json", "plan.json"
DECISION, ROUND = "decision", "round-"
"""Folders under ``scratch``: the plan when it is made, and each finished round of several."""
FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """Whatever of a run could change a sum and is not in its recipe; fixed by its first attempt.

    Attributes:
        micro_batch: windows that run through a block at once.
        workers: processes that share the windows.
        threads: of one process.
        capability: the vector instructions that torch uses.
        weights: whether each process trains them whole or a part of them.
    """

    micro_batch: int
    device: str
    workers: int
    threads: int
    torch: str
    transformers: str
    processor: str
    capability: str
    weights: str = "whole"

    def bound(self) -> dict[str, Any]:
        """What an attempt cannot choose: it has to be found as it was."""
        content = asdict(self)
        return {
            name: content[name] for name in ("device", "torch", "transformers", "processor", "capability", "weights")
        }


def present_settings(micro_batch: int, placement: Placement = HERE, workers: int = 1, shards: bool = False) -> Settings:
    """The settings of a run that begins here and now."""
    return Settings(
        micro_batch=micro_batch,
        device=placement.describe(),
        workers=workers,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        processor=_processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        weights="shared out (accelerate launch --use_fsdp)" if shards else "whole",
    )


@contextmanager
def applied(settings: Settings) -> Iterator[None]:
    """Compute with these settings while the context lasts.

    Also the first attempt sets the number of threads, although it is the one there is: that it was set fixes how the
    libraries underneath divide their work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Start:
    """The beginning of a run, as ``started.json`` keeps it.

    Attributes:
        identity: what the result depends on: command, versions, code, recipe, model, texts.
        overwrite: it was begun to replace what stands at its place.
        goes_on: what it finishes is worth keeping; False for a stage that always starts over.
        other_workers: go on with another number of workers than it was begun with.
    """

    identity: dict[str, Any]
    settings: Settings
    overwrite: bool = False
    goes_on: bool = True
    other_workers: bool = False

    def write(self, folder: Path) -> None:
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "settings": asdict(self.settings),
            "overwrite": self.overwrite,
            "goes_on": self.goes_on,
        }
        write_json(folder / STARTED, content, durable=True)

    def same_as(self, left: Start) -> bool:
        """Whether ``left`` began this very run, on a machine like this."""
        return (
            not differences(left.identity, _as_stored(self.identity)) and left.settings.bound() == self.settings.bound()
        )

    def going_on_from(self, left: Start, folder: Path) -> Start:
        """This start with the settings of ``left``, whose unfinished work is in ``folder``.

        Raises:
            OutputError: that is another run, or the machine is another; the sentence names the difference.
        """
        found = differences(left.identity, _as_stored(self.identity))
        if found:
            raise OutputError(
                f"{folder} holds an unfinished run with {in_words(found)}; "
                "give another --out, --overwrite to start over, or the same command to finish that one"
            )
        found = differences(left.settings.bound(), self.settings.bound(), "settings.")
        if found:
            raise OutputError(
                f"{folder} holds an unfinished run with {in_words(found)}, where sums could differ; "
                "finish it where it was begun, or give --overwrite to start over"
            )
        return replace(self, settings=replace(left.settings, workers=self._workers(left, folder)))

    def _workers(self, left: Start, folder: Path) -> int:
        before, now = left.settings.workers, self.settings.workers
        if before == now:
            return now
        if not self.other_workers:
            instead = "--other-workers to go on although sums may then differ in their last bits"
            if self.identity.get("command") == "recover":  # each worker's random state is kept
                instead = "--overwrite to start over"
            raise OutputError(
                f"{folder} holds an unfinished run with {before} workers, and this one has {now}; give as many, or {instead}"
            )
        workers = "one worker" if now == 1 else f"{now} workers"
        log.warning("Going on with %s instead of %d: sums may differ in their last bits.", workers, before)
        return now


def read_start(folder: Path) -> Start | None:
    """How the unfinished work in ``folder`` was begun; None where it never was, or by another form of this file."""
    try:
        content = json.loads((folder / STARTED).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return None
        settings = Settings(**content["settings"])
        return Start(dict(content["identity"]), settings, content["overwrite"], content["goes_on"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.cache
def source_digest() -> str:
    """Hex SHA-256 of the package's own source files: other code may count otherwise, whatever version it says."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\n{file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


# -- how much was finished


def note_finished(scratch: Path, finished: int, of: int) -> None:
    """Say that so many blocks are safely on the disk; whoever keeps blocks under ``scratch`` calls it after each."""
    write_json(scratch / FINISHED, {"finished": finished, "of": of})


@dataclass(frozen=True)
class Progress:
    """How far an unfinished run came.

    Attributes:
        decided: what leaves is decided.
        rounds: how many rounds of several are.
        finished: blocks of what was being done, by ``note_finished``.
        of: how many it has; 0 where nobody said.
    """

    decided: bool
    rounds: int
    finished: int
    of: int

    def in_words(self) -> str:
        """``1 round and 3 of 12 blocks were finished``; nothing where nothing is known."""
        blocks = f"{self.finished} of {self.of} blocks" if self.of else ""
        if self.decided:
            return "what leaves was decided" + (f", and {blocks} were finished" if blocks else "")
        rounds = f"{self.rounds} round{'' if self.rounds == 1 else 's'}" if self.rounds else ""
        what = " and ".join(filter(None, [rounds, blocks]))
        return what and f"{what} {'was' if self.rounds == 1 and not blocks else 'were'} finished"


def read_progress(scratch: Path) -> Progress:
    """What ``scratch`` says of the attempts before."""
    decision = scratch / DECISION / PLAN
    rounds = list(scratch.glob(f"{ROUND}*/{PLAN}"))
    settled = max((file.stat().st_mtime_ns for file in (decision, *rounds) if file.is_file()), default=0)
    # What was noted before the last decision was about what led to it.
    notes = [file for file in (scratch / FINISHED, *scratch.glob(f"{ROUND}*/{FINISHED}")) if file.is_file()]
    newest = max(notes, key=lambda file: file.stat().st_mtime_ns, default=None)
    finished, of = _blocks_in(newest) if newest is not None and newest.stat().st_mtime_ns > settled else (0, 0)
    return Progress(decision.is_file(), len(rounds), finished, of)


def _blocks_in(file: Path) -> tuple[int, int]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return int(content["finished"]), int(content["of"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0


# -- differences


@dataclass(frozen=True)
class Difference:
    """One field on which two nested dicts differ; ``path`` joins the keys with dots, an absent value is None."""

    path: str
    before: Any
    now: Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> list[Difference]:
    """Field by field, in the order of the keys."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{inside}{key}.")
        elif old != new:
            found.append(Difference(f"{inside}{key}", old, new))
    return found


FOLLOWS = {"model": "recipe.model", "calibration": "recipe.calibration", "code": "version"}
"""What differs of itself where another field does, and need not be said then."""

NAMES = {
    "command": "the command",
    "version": "Secateur",
    "code": "source files of Secateur that have the digest",
    "model": "a model whose content has the digest",
    "calibration": "a calibration text of the digest",
    "plan": "a plan of the digest",
    "evaluate_on": "--evaluate",
    "settings.capability": "vector instructions",
    "settings.processor": "the processor",
    "settings.weights": "weights that are",
}


def in_words(found: list[Difference]) -> str:
    """``--ratio 0.5 and --seed 1, and this one says 0.3 and 2``."""
    paths = {difference.path for difference in found}
    if "command" in paths:
        found = [difference for difference in found if difference.path == "command"]
    said = [difference for difference in found if FOLLOWS.get(difference.path) not in paths]
    before = " and ".join(f"{_name(difference.path)} {_value(difference.before)}" for difference in said)
    return f"{before}, and this one says {' and '.join(_value(difference.now) for difference in said)}"


def _name(path: str) -> str:
    place, _, field = path.rpartition(".")
    if path in NAMES:
        return NAMES[path]
    return f"--{field.replace('_', '-')}" if place == "recipe" else path.removeprefix("settings.")


def _value(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return value[:12] if len(value) == 64 and set(value) <= set("0123456789abcdef") else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _as_stored(content: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a JSON file."""
    return dict(json.loads(json.dumps(content)))


def _processor() -> str:
    """The processor's name: numerical libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
