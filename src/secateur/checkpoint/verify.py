"""After writing: a fresh process loads the folder as any user would and its logits are compared with ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from secateur.checkpoint.architecture import ModelInputs, loader_for, named_inputs
from secateur.checkpoint.skeleton import load_config
from secateur.errors import OutputError, ResourceError

TOLERANCE = 1e-3
"""Largest difference allowed, as a share of the largest logit. A cut changes the order of float32 sums (about 1e-6);
a wrong index or a wrong config changes logits by their own size."""

PLAIN_LOADER = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
folder, loader, inputs, result, remote = sys.argv[1:]
model, report = getattr(transformers, loader).from_pretrained(
    folder, dtype=torch.float32, local_files_only=True, trust_remote_code=remote == "yes", output_loading_info=True)
wrong = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(key)]
if wrong:
    sys.exit(f"{wrong[0]}: {list(report[wrong[0]])[:3]}")
with torch.no_grad():
    logits = model.eval()(**load_file(inputs)).logits
save_file({"logits": logits.float().contiguous()}, result)
"""


def fresh_logits(folder: Path, inputs: torch.Tensor | ModelInputs, remote_code: bool) -> torch.Tensor:
    """Logits of the folder, loaded with plain transformers in a process that does not know Secateur.

    Args:
        inputs: token ids ``(B, T)``, or the model's inputs by name.

    Raises:
        OutputError: the folder does not load.
        ResourceError: there is not the memory to load it.
    """
    loader = loader_for(load_config(folder, remote_code)).__name__
    place = folder.resolve() / "scratch"  # a run's own, where it has one: what a kill leaves there is found again
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as scratch:
        given, result = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in named_inputs(inputs).items()}, given)
        remote = "yes" if remote_code else "no"
        command = [sys.executable, "-c", PLAIN_LOADER, str(folder.resolve()), loader, str(given), str(result), remote]
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


def compare_logits(expected_BTV: torch.Tensor, found_BTV: torch.Tensor) -> float:
    """The largest difference as a share of the largest expected logit.

    Raises:
        OutputError: the shapes differ or the difference exceeds ``TOLERANCE``.
    """
    if expected_BTV.shape != found_BTV.shape:
        raise OutputError(
            f"the written model gives logits of shape {list(found_BTV.shape)} instead of {list(expected_BTV.shape)}; nothing was kept"
        )
    scale = expected_BTV.abs().max().clamp_min(1e-12)
    difference = float((expected_BTV - found_BTV).abs().max() / scale)
    if not difference <= TOLERANCE:
        raise OutputError(
            f"the written model's logits differ from the masked dense model's by {difference:.1e} of the largest logit; "
            "nothing was kept"
        )
    return difference
