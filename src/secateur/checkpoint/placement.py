"""Where a block computes, and in which numbers."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

import torch

from secateur.errors import ResourceError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """A device and the dtype of the numbers there.

    On the CPU blocks compute in float32: one block is small, and float32 sums are what the formulas mean. On a GPU they
    compute in bfloat16, whose products accumulate in float32; weights stored in float32 stay so. Statistics and scores are
    float32 everywhere.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def describe(self) -> str:
        """The device's name, and its numbers."""
        name = torch.cuda.get_device_name(self.device) if self.is_gpu else self.device.type
        return name if self == HERE else f"{name}, {str(self.dtype).removeprefix('torch.')}"

    def arrive(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device. From a thread of its own the copy overlaps with what the GPU computes."""
        if not self.is_gpu:
            return tensor
        side = _side_stream(self.device)
        with torch.cuda.stream(side):
            arrived = tensor.pin_memory().to(self.device, non_blocking=True)
        side.synchronize()  # the host waits in its reading thread; the computing stream does not
        return arrived

    def numbers(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor as it is computed with; indices and flags stay what they are."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)


HERE = Placement()


def placement_for(device: str, stored: torch.dtype) -> Placement:
    """The placement that ``--device`` names: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ResourceError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return HERE
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = torch.device(device)
    if (found.index or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count else "no GPU that torch can use"
        raise ResourceError(f"--device {device} is not on this machine, which has {there}; give --device cpu or auto")
    dtype = torch.float32 if stored in (torch.float32, torch.float64) else torch.bfloat16
    return Placement(found if found.index is not None else torch.device("cuda", torch.cuda.current_device()), dtype)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def give_back_memory() -> None:
    """Hand what was freed back to the system: the C library keeps freed pieces of a heap, and they pile up block by block."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others may not
