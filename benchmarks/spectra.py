"""Time of AlphaPruning's spectra: every matrix of SmolLM2-135M, and one block of Llama-2-7B's shape, random.

    python benchmarks/spectra.py

One thread, a process for each estimator; reading the weights is not counted. Spectra are kept by content, so a run takes this time once for a model.
"""

from __future__ import annotations

from common import RESULTS, Results, fresh

OF_A_MODEL = """
from secateur import console; console.quiet_libraries()
from secateur.checkpoint.reader import open_checkpoint
checkpoint = open_checkpoint("smollm2")
def blocks():
    for index in range(len(checkpoint.skeleton.blocks)):
        prefix = checkpoint.skeleton.block_prefix(index)
        names = {name: prefix + matrix.parameter for name, matrix in checkpoint.skeleton.prunable(index).items()}
        read = checkpoint.read(list(names.values()))
        yield {name: read[full].float() for name, full in names.items()}
"""
OF_A_SHAPE = """
import torch
torch.manual_seed(0)
shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
def blocks():
    yield {name: torch.randn(shape) / 64 for name, shape in shapes.items()}
"""
FIGURES = """
from secateur.allocation.alpha import Alpha, AlphaOptions
policy = Alpha(AlphaOptions(metric={metric!r}))
spent, matrices = 0.0, 0
for block in blocks():
    before = time.process_time()
    policy.figure(block, {{}})
    spent += time.process_time() - before
    matrices += len(block)
result = dict(processor_seconds=spent, matrices=matrices)
"""
CASES = {
    "SmolLM2-135M, all blocks": OF_A_MODEL,
    "Llama-2-7B's shape, one block": OF_A_SHAPE,
}
METRICS = ("peak", "peak-fixed", "mid")


def main() -> None:
    results = Results("spectra", "python benchmarks/spectra.py")
    for name, weights in CASES.items():
        for metric in METRICS:
            if results.get(f"{name}: {metric}") is None:
                results.put(f"{name}: {metric}", fresh(weights + FIGURES.format(metric=metric), threads=1))
    lines = [
        results.caption("; processor time"), "",
        f"| | matrices | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 2) + "|",
    ]  # fmt: skip
    for name in CASES:
        found = [results.get(f"{name}: {metric}") for metric in METRICS]
        seconds = " | ".join(f"{entry['processor_seconds']:.1f} s" for entry in found)
        lines.append(f"| {name} | {found[0]['matrices']} | {seconds} |")
    (RESULTS / "spectra.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
