"""How far roundings alone move SparseGPT's perplexity: SmolLM2-135M at 50 %, its second moments disturbed by a hair.

    python benchmarks/rounding.py [--reference DIR] [--seeds 4]

A weight's mask depends on the weights updated so far, and a later block's inputs on the masks before it, so a near-tie that falls otherwise
moves everything after it. Each entry multiplies every second moment by ``1 + noise``, by far less than machines differ in
float32, once with float32 and once with float64 second moments and decompositions; seed 0 leaves them as they are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import DEFAULT_REFERENCE, RESULTS, Results, fresh

NOISE = {"float32": 1e-6, "float64": 1e-7}
"""Relative, normal: about ten float32 roundings of one sum, and one."""

RUN = """
import tempfile
import torch
import secateur
from secateur import console; console.quiet_libraries()
from secateur.calibration import text_windows
from secateur.evaluation import perplexity
from secateur.removal import curvature
from secateur.statistics import InputSecondMoment

dtype, generator = torch.{dtype}, torch.Generator().manual_seed({seed})

def term(self, x_TI):
    x_TI = x_TI.to(dtype)
    moment_II = x_TI.T @ x_TI
    if {seed}:
        noise_II = torch.randn(moment_II.shape, generator=generator)
        moment_II *= 1 + (noise_II + noise_II.T) / 2 * {noise}
    return moment_II

InputSecondMoment.term = term
if dtype == torch.float64:
    lower = curvature._lower
    curvature._lower = lambda h_II, ridge_I, tried: lower(h_II.double(), ridge_I, tried) if tried == dtype else None
with tempfile.TemporaryDirectory() as folder:
    secateur.prune(
        "smollm2", folder + "/out", criterion="sparsegpt", unit="weight", ratio=0.5, calibration={reference!r} + "/calibration-tokens.safetensors"
    )
    windows = text_windows({reference!r} + "/evaluation-tokens.safetensors", folder + "/out")
    result = dict(perplexity=perplexity(secateur.load(folder + "/out"), windows).value)
"""


def table(results: Results, seeds: int) -> str:
    lines = [
        results.caption(". SparseGPT at 50 % on the reference windows, where the published code gave 50.205"),
        "",
        "| second moments | as they are | " + " | ".join(f"noise {seed}" for seed in range(1, seeds)) + " |",
        "|---" * (seeds + 1) + "|",
    ]
    for dtype, noise in NOISE.items():
        entries = [results.get(f"{dtype}, {seed}") for seed in range(seeds)]
        cells = ["not run yet" if entry is None else f"{entry['perplexity']:.2f}" for entry in entries]
        lines.append(f"| {dtype}, noise {noise:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    results = Results("rounding", "python benchmarks/rounding.py")
    for seed in range(arguments.seeds):
        for dtype, noise in NOISE.items():
            key = f"{dtype}, {seed}"
            if results.get(key) is None:
                code = RUN.format(dtype=dtype, seed=seed, noise=noise, reference=str(arguments.reference.resolve()))
                found = fresh(code)
                results.put(key, {"perplexity": found["perplexity"], "seconds": found["seconds"]})
                (RESULTS / "rounding.md").write_text(table(results, arguments.seeds))
                print(f"{time.strftime('%H:%M')} {key}: {found['perplexity']:.2f}", flush=True)


if __name__ == "__main__":
    main()
