"""After writing: a fresh process loads the folder as any user would and its logits are compared with ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur.checkpoint import plain_load
from secateur.checkpoint.architecture import ModelInputs, loader_for, named_inputs
from secateur.checkpoint.skeleton import load_config
from secateur.console import log
from secateur.errors import OutputError, ResourceError
from secateur.files import human_bytes
from secateur.finite import all_finite
from secateur.memory import memory_available

TOLERANCE = 1e-3
"""Largest difference allowed, as a share of the largest logit. A cut changes the order of float32 sums (about 1e-6);
a wrong index or a wrong config changes logits by their own size."""

FRESH_BYTES = 4
"""Of a number in the fresh process, which computes in float32."""


def fresh_logits(
    folder: Path, inputs: torch.Tensor | ModelInputs, remote_code: bool, limit: int | None = None
) -> torch.Tensor:
    """Logits of the folder, loaded with plain transformers in a process that does not know Secateur.

    Args:
        inputs: token ids ``(B, T)``, or the model's inputs by name.
        limit: bytes above which the weights are left on disk and brought in a module at a time; None: half of what
            memory is free.

    Raises:
        OutputError: the folder does not load.
        ResourceError: there is not the memory to load it.
    """
    loader = loader_for(load_config(folder, remote_code)).__name__
    needed = float32_bytes(folder)
    if limit is None:
        limit = (memory_available() or 2 * needed) // 2
    if needed > limit:
        log.info("In float32 it would take %s; it is checked one module at a time.", human_bytes(needed))
    place = folder.resolve() / "scratch"  # a run's own, where it has one: what a kill leaves there is found again
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as scratch:
        given, result = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in named_inputs(inputs).items()}, given)
        offload = str(Path(scratch) / "offload") if needed > limit else ""
        words = [str(folder.resolve()), loader, str(given), str(result), "yes" if remote_code else "no", offload]
        # -P: the script's own folder is Secateur's, whose modules must not be found.
        command = [sys.executable, "-P", plain_load.__file__, *words]
        # Remote code is imported through a cache of modules; a private one leaves the user's as it is.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
        # As many threads as here: the difference that is recorded must not depend on which attempt measured it.
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        finished = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode == -signal.SIGKILL:
            raise ResourceError(
                "the system killed the process that loads the written model to check it, most likely for want of memory; "
                "free some and run again"
            )
        if finished.returncode != 0 or not result.is_file():
            last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise OutputError(f"the written model does not load in plain transformers ({last}); nothing was kept")
        return load_file(result)["logits"]


def float32_bytes(folder: Path) -> int:
    """What the folder's weights take in float32, by their headers."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            names = stream.keys()
            count += sum(torch.Size(stream.get_slice(name).get_shape()).numel() for name in names)
    return count * FRESH_BYTES


def compare_logits(expected_BTV: torch.Tensor, found_BTV: torch.Tensor) -> float:
    """The largest difference as a share of the largest expected logit.

    Raises:
        OutputError: the shapes differ, the expected ones are not finite, or the difference exceeds ``TOLERANCE``.
    """
    if expected_BTV.shape != found_BTV.shape:
        raise OutputError(
            f"the written model gives logits of shape {list(found_BTV.shape)} instead of {list(expected_BTV.shape)}; nothing was kept"
        )
    if not all_finite(expected_BTV):
        raise OutputError(
            "the masked dense model's own logits are not finite, for its numbers overflow, so what was written cannot be "
            "compared with it; nothing was kept: prune less, or give a model whose weights are smaller"
        )
    scale = expected_BTV.abs().max().clamp_min(1e-12)
    difference = float((expected_BTV - found_BTV).abs().max() / scale)
    if not difference <= TOLERANCE:
        raise OutputError(
            f"the written model's logits differ from the masked dense model's by {difference:.1e} of the largest logit; "
            "nothing was kept"
        )
    return difference
