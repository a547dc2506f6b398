"""Several processes on one run: each takes a part of the windows, and what they measure is added up.

The engine is torch.distributed as ``torchrun`` starts it; nothing here knows machines or ports. A process that nobody
started with others is a crew of one, for which everything here does nothing.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Iterable
from typing import Any

import torch

from secateur.errors import RecipeError, ResourceError

PATIENCE = datetime.timedelta(minutes=30)
"""How long a worker waits for the others before it gives the run up; a dead one is noticed at once."""


class LostWorkerError(ResourceError):
    """Another worker has ended, so this one cannot go on; the same command can."""


class Workers:
    """The processes of one run.

    Attributes:
        rank: this process's number.
        size: how many there are.
        shards: whether they share out the weights of what they train; one alone has nobody to share with.
    """

    def __init__(self, rank: int = 0, size: int = 1, shards: bool = False) -> None:
        self.rank, self.size, self.shards = rank, size, shards and size > 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once, and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of ``count`` things: consecutive ones, as equal as can be."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def mine(self, index: int) -> bool:
        """Whether this process does the ``index``-th of things that are dealt out in turn."""
        return index % self.size == self.rank

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            with _lost_is_an_error():
                torch.distributed.barrier()

    def all(self, value: Any) -> list[Any]:
        """Everyone's ``value``, in the order of their numbers."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_is_an_error():
            torch.distributed.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """The leader's ``value``."""
        if self.size == 1:
            return value
        values = [value]
        with _lost_is_an_error():
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by the sum over all workers, in place; all get the same bits."""
        if self.size == 1:
            return
        with _lost_is_an_error():
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def hand_round(self, tensor: torch.Tensor, owner: int) -> None:
        """Replace ``tensor`` by ``owner``'s, in place."""
        if self.size > 1:
            with _lost_is_an_error():
                torch.distributed.broadcast(tensor, src=owner)


ALONE = Workers()


class _lost_is_an_error:  # noqa: N801 - reads as a word in a with statement
    """A collective operation fails when a worker has gone."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (RuntimeError, torch.distributed.DistError)):
            raise LostWorkerError("another worker has ended, so this one stops too") from error


def started() -> int:
    """How many processes ``torchrun`` says it has started.

    Raises:
        RecipeError: what it says is no number.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdigit() or int(text) < 1:
        raise RecipeError(
            f"WORLD_SIZE is '{text}', which is no number of workers; start them with torchrun, or unset it"
        )
    return int(text)


USE_FSDP = "ACCELERATE_USE_FSDP"
SHARDING = {USE_FSDP: "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""What ``accelerate launch`` sets to share out a model's weights, and what it means by it."""


def _is_asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


def refuse_sharding(allowed: tuple[str, ...] = ()) -> None:
    """Scores and masks of whole matrices need weights in one piece; recovery alone knows how to share them out, by FSDP.

    Raises:
        RecipeError: ``accelerate launch`` was told to share them out, by something that is not ``allowed``.
    """
    for name, called in SHARDING.items():
        if name not in allowed and _is_asked(name):
            raise RecipeError(
                f"{called} shares out the weights, and Secateur needs each matrix whole; launch without it "
                f"(accelerate launch --multi_gpu, or torchrun), or unset {name}"
            )


def join(may_shard: bool = False) -> Workers:
    """The workers that ``torchrun`` or ``accelerate launch`` has started, or this process alone.

    Args:
        may_shard: where FSDP is asked for, share out weights; otherwise it is refused.

    Raises:
        ResourceError: they cannot be reached.
        RecipeError: the environment speaks of workers that are not there.
    """
    refuse_sharding((USE_FSDP,) if may_shard else ())
    size = started()
    if size == 1:
        return ALONE
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        raise RecipeError(
            f"WORLD_SIZE says that there are {size} workers, but torchrun has not started them; start them with it, or "
            "unset WORLD_SIZE"
        )
    if not torch.distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            # NCCL moves tensors on GPUs, gloo those on the host and what is said in words.
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ResourceError(f"the workers cannot reach each other ({error}); start them with torchrun") from error
        atexit.register(_leave)
    return Workers(torch.distributed.get_rank(), size, _is_asked(USE_FSDP))


def alone(command: str) -> None:
    """Refuse to run ``command`` in several processes.

    Raises:
        RecipeError: ``torchrun`` has started more than one.
    """
    if started() > 1:
        raise RecipeError(
            f"several workers share the work of prune and of recover, not of {command}; start it without torchrun and "
            "accelerate launch"
        )


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
