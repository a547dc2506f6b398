"""Streamed exact gradients beside plain backpropagation: time and peak memory, one thread, head included.

    python benchmarks/gradients.py [--reference DIR] [--windows 16]

Both gather the gradient of the mean loss (LLM-Pruner's first order) of every matrix in the blocks of SmolLM2-135M, over
windows of 256 tokens, each in a process of its own. Then the same on a model of the same width and four times the blocks
with random weights. Finally the largest relative difference between the two, element by element.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import DEFAULT_REFERENCE, Results, fresh

from secateur.checkpoint.source import resolve_model

LOAD = """
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
ids = load_file({windows!r})["input_ids"][:{count}]
from secateur import console; console.quiet_libraries()
"""

PLAIN = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32).eval()
blocks = [p for n, p in model.named_parameters() if "layers." in n]
model.requires_grad_(False)
for p in blocks: p.requires_grad_(p.dim() == 2)
started = time.perf_counter()
for start in range(0, len(ids), {micro_batch}):
    batch = ids[start:start + {micro_batch}]
    (model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch) / len(ids)).backward()
result = dict(seconds=time.perf_counter() - started)
if {save!r}:
    save_file({{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}, {save!r})
"""

STREAMED = """
from secateur.checkpoint.reader import open_checkpoint
from secateur.statistics import GradientMean
from secateur.sweep import Sweep, SweepSettings
checkpoint = open_checkpoint({folder!r})
found = {{}}
def visit(index, block, statistics):
    if {save!r}:
        for name, kinds in statistics.items():
            found[f"model.layers.{{index}}.{{name}}"] = kinds[GradientMean].mean()
started = time.perf_counter()
sweep = Sweep(checkpoint, ids, SweepSettings({micro_batch}, {memory}, Path("scratch")))
sweep.dense(frozenset({{GradientMean}}), range(len(checkpoint.skeleton.blocks)), visit)
result = dict(seconds=time.perf_counter() - started)
if {save!r}:
    save_file(found, {save!r})
"""

DEEPER = """
import json, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
fields = json.loads(Path({folder!r}, "config.json").read_text())
config = LlamaConfig(**{{**fields, "num_hidden_layers": 4 * fields["num_hidden_layers"]}})
torch.manual_seed(0)
LlamaForCausalLM(config).to(torch.float32).save_pretrained({target!r})
"""

DIFFERENCE = """
from safetensors.torch import load_file
a, b = load_file({plain!r}), load_file({streamed!r})
assert set(b) == {{n for n in a if a[n].dim() == 2}}
result = dict(largest_difference=max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in b))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = Results("gradients", f"python benchmarks/gradients.py --windows {arguments.windows}")
    smollm2 = resolve_model("smollm2").folder
    deeper = arguments.work.resolve() / "deeper"
    if not (deeper / "config.json").is_file():
        fresh(DEEPER.format(folder=str(smollm2), target=str(deeper)))
    shared = {
        "windows": str((arguments.reference / "calibration-tokens.safetensors").resolve()),
        "count": arguments.windows,
        "micro_batch": arguments.micro_batch,
    }
    for model, folder in (("smollm2", smollm2), ("deeper", deeper)):
        kept = {
            way: str(arguments.work.resolve() / f"{way}.safetensors") if model == "smollm2" else ""
            for way in ("plain", "streamed")
        }
        ways = {
            "plain": (PLAIN, {"save": ""}),
            "streamed": (STREAMED, {"save": "", "memory": 0}),
            "streamed, 1 GiB allowed": (STREAMED, {"save": "", "memory": 1 << 30}),
        }
        for way, (code, options) in ways.items():
            if results.get(f"{model}: {way}") is None:
                entry = fresh((LOAD + code).format(folder=str(folder), **shared, **options), threads=1)
                results.put(f"{model}: {way}", entry)
            entry = results.get(f"{model}: {way}")
            plain = results.get(f"{model}: plain")
            assert entry is not None
            assert plain is not None
            print(
                f"{model:8} {way:24} {entry['seconds']:7.1f} s  {entry['seconds'] / plain['seconds']:.2f} x plain  {entry['peak_mib']:6.0f} MiB"
            )
        if kept["plain"] and results.get("difference") is None:
            few = shared | {"count": 4}
            fresh((LOAD + PLAIN).format(folder=str(folder), **few, save=kept["plain"]), threads=1)
            fresh((LOAD + STREAMED).format(folder=str(folder), **few, save=kept["streamed"], memory=0), threads=1)
            results.put("difference", fresh(DIFFERENCE.format(**kept)))
    print("largest relative difference between the two:", results.get("difference"))


if __name__ == "__main__":
    main()
