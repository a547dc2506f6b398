"""The Trainer's checkpoints, made whole: what is trained, optimiser, schedule, random states and history, in one rename.

Nothing in them is unpickled: tensors that are trained lie in safetensors, the history in JSON, and the rest in files that the
Trainer reads with ``weights_only=True``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.console import log
from secateur.errors import OutputError
from secateur.files import atomic_file, remove_temporaries, sync, sync_tree
from secateur.recovery.methods import Student
from secateur.recovery.sharding import as_part_of, local
from secateur.workers import ALONE, Workers

PREFIX, TRAINED, BEST = "checkpoint-", "trained.safetensors", "best.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"

LEAST_SECONDS = 15.0
"""Between two checkpoints."""
SHARE = 30
"""And at least so many times as long as the last one took to write."""


def write_state(file: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors so that the file is whole or not there, also after a loss of power."""
    with atomic_file(file, durable=True) as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, temporary)


def read_state(file: Path) -> dict[str, Tensor]:
    """What ``write_state`` wrote.

    Raises:
        OutputError: it is not there or not whole.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise OutputError(
            f"{file}, which this recovery wrote, is damaged ({error}); start over with --overwrite"
        ) from error


def _history(place: Path) -> Any:
    from transformers.trainer import TRAINER_STATE_NAME, TrainerState

    return TrainerState.load_from_json(str(place / TRAINER_STATE_NAME))


def _of(name: str, rank: int) -> str:
    """The file that holds what worker ``rank`` has of ``name``."""
    return Path(name).stem + f"_{rank}" + Path(name).suffix


def _of_all(name: str, workers: Workers, each: bool) -> list[str]:
    """The files that hold ``name``: one, or one of ``each``."""
    return [_of(name, rank) for rank in range(workers.size)] if each else [name]


def _read_through(place: Path, workers: Workers) -> None:
    """Read every file of a checkpoint once; what PyTorch wrote is an archive with sums of its parts."""
    _history(place)
    for name in _of_all(TRAINED, workers, workers.shards):
        read_state(place / name)
    optimizers = _of_all(OPTIMIZER, workers, workers.shards)
    for name in (*optimizers, SCHEDULER, *_of_all("rng_state.pth", workers, workers.size > 1)):
        with zipfile.ZipFile(place / name) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{name}, {damaged}")


class Checkpoints:
    """Half a Trainer: writes checkpoints of a ``Student`` and finds the last whole one."""

    student: Student
    folder: Path

    def begin(self, student: Student, folder: Path, workers: Workers = ALONE) -> None:
        """Say what is saved, and where, and by whom: the first of ``workers`` writes all but the others' random states.

        Where weights are shared out, each writes its own part of what is trained, and of the optimiser's state.
        """
        self.student, self.folder, self.workers = student, folder, workers
        if workers.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(folder)
            self._remove_damaged()
        workers.wait()
        self._place: str | None = None
        self._saved_at, self._cost = time.monotonic(), 0.0
        self.model_accepts_loss_kwargs = False  # the loss is a mean over each micro-batch: divide by their number

    @property
    def writes(self) -> bool:
        """Whether this worker has something to write that no other has."""
        return self.workers.leads or self.workers.shards

    def own(self, name: str) -> str:
        """The file ``name`` as this worker writes it and reads it."""
        return _of(name, self.workers.rank) if self.workers.shards else name

    def _remove_damaged(self) -> None:
        """Training from the start ends where training from a checkpoint ends, so one that cannot be read costs only time."""
        for place in self.folder.glob(f"{PREFIX}*"):
            try:
                _read_through(place, self.workers)
            except (OutputError, OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
                log.warning(f"The checkpoint {place} is damaged ({error}), so training starts over.")
                shutil.rmtree(place)

    def is_checkpoint_due(self) -> bool:
        """Whether the work since the last checkpoint is worth writing one. It changes no bit of the result."""
        due = time.monotonic() - self._saved_at >= max(LEAST_SECONDS, SHARE * self._cost)
        return bool(self.workers.first(due))

    def found_folder(self) -> str | None:
        """The last whole checkpoint's folder; None where there is none."""
        numbers = [int(place.name.removeprefix(PREFIX)) for place in self.folder.glob(f"{PREFIX}*")]
        return str(self.folder / f"{PREFIX}{max(numbers)}") if numbers else None

    def found(self) -> Any:
        """The Trainer's state in it."""
        place = self.found_folder()
        return _history(Path(place)) if place else None

    def found_state(self) -> dict[str, Tensor]:
        """The student's state in it."""
        place = self.found_folder()
        assert place is not None
        return read_state(Path(place) / self.own(TRAINED))

    # -- what the Trainer calls

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._place or str(self.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.monotonic()
        name = f"{PREFIX}{self.state.global_step}"  # type: ignore[attr-defined]
        final = self.folder / name
        leads = self.workers.leads
        if self.workers.first(not final.exists()):
            with self._temporary() if leads else nullcontext(None) as own:
                self._place = self.workers.first(own)
                assert self._place is not None
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self.workers.wait()
                if leads:
                    sync_tree(Path(self._place) / name)
                    os.replace(Path(self._place) / name, final)
            self._place = None
            sync(self.folder)
        for other in self.folder.glob(f"{PREFIX}*") if leads else ():
            if other != final:
                shutil.rmtree(other)
        self.workers.wait()
        self._saved_at, self._cost = time.monotonic(), time.monotonic() - began

    def _temporary(self) -> Any:
        return tempfile.TemporaryDirectory(prefix=".checkpoint.", dir=self.folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        if self.writes:
            state = {name: tensor.detach().contiguous() for name, tensor in self.student.state().items()}
            save_file(state, Path(output_dir) / self.own(TRAINED))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.workers.shards:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        content = self.optimizer.state_dict()  # type: ignore[attr-defined]
        state = {number: {key: local(part) for key, part in kept.items()} for number, kept in content["state"].items()}
        torch.save({**content, "state": state}, Path(output_dir) / self.own(OPTIMIZER))
        if self.workers.leads:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)  # type: ignore[attr-defined]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.workers.shards or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        optimizer: Any = self.optimizer  # type: ignore[attr-defined]
        found = torch.load(Path(checkpoint) / self.own(OPTIMIZER), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(found)
        for parameter, kept in optimizer.state.items():
            kept |= {key: as_part_of(part, parameter) for key, part in kept.items()}
        schedule = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.student.take(read_state(Path(resume_from_checkpoint) / self.own(TRAINED)))
