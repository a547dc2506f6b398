"""One GPU and a model of Llama-2-7B's shape: what planning takes in time and in memory, beside plain passes of transformers.

    python benchmarks/gpu.py --model DIR [--methods wanda ...] [--windows 32] [--tokens 2048] [--device cuda]

DIR is made by large_model.py where it is not there (13.5 GB, random bf16 weights: the numbers do not matter to time and memory). Every
line is a process of its own. Planning reads the model from disk block by block; the plain passes hold all of it on the GPU and go over
the same windows one at a time, and their time does not count loading. Peak memory of the GPU is what PyTorch had taken from it. What has
been measured is kept.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import large
import torch
from common import RESULTS, Results, fresh
from large_model import LAYERS, VOCABULARY, make_large_model
from safetensors.torch import save_file

PLAIN = {"plain forward": False, "plain forward and backward": True}
METHODS: dict[str, dict[str, Any]] = dict(large.METHODS.values()) | {
    "sparsegpt, weights 50 %": {"criterion": "sparsegpt", "unit": "weight", "ratio": 0.5},
    "alps, weights 50 %": {
        "criterion": "sparsegpt",
        "unit": "weight",
        "ratio": 0.5,
        "within": "row",
        "removal": "alps",
    },
}

PASSES = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
ids = load_file({windows!r})["input_ids"].to({device!r})
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.bfloat16, device_map={device!r}).eval()
def go(ids):
    for window in ids:
        if {backward}:
            model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        else:
            with torch.no_grad():
                model.model(input_ids=window[None], use_cache=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
go(ids[:2])
started = time.perf_counter()
go(ids)
result = dict(seconds=time.perf_counter() - started, gpu_mib=torch.cuda.max_memory_reserved() / 2**20)
"""
PLAN = """
import torch
import secateur
from secateur import console; console.quiet_libraries()
started = time.perf_counter()
plan = secateur.plan({model!r}, calibration={windows!r}, device={device!r}, **{fields!r})
result = dict(seconds=time.perf_counter() - started, gpu_mib=torch.cuda.max_memory_reserved() / 2**20)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=[*PLAIN, *METHODS])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    model = make_large_model(arguments.model.resolve(), arguments.layers, arguments.device)
    windows = model.parent / "windows.safetensors"
    shape = (arguments.windows, arguments.tokens)
    save_file(
        {"input_ids": torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))}, str(windows)
    )
    results = Results("gpu", "python benchmarks/gpu.py --model DIR")
    for method in arguments.methods:
        if results.get(method) is not None:
            continue
        places = {"model": str(model), "windows": str(windows), "device": arguments.device}
        if method in PLAIN:
            code = PASSES.format(backward=PLAIN[method], **places)
        else:
            code = PLAN.format(fields=METHODS[method], **places)
        cache = model.parent / "gpu-cache"
        results.put(method, fresh(code, SECATEUR_CACHE=str(cache)) | {"windows": shape})
        shutil.rmtree(cache, ignore_errors=True)
        (RESULTS / "gpu.md").write_text(table(results))
        print(f"{method}: {results.get(method)}", flush=True)


def table(results: Results) -> str:
    """Seconds and memory of each line, and seconds as multiples of the plain forward."""
    known = {name: results.get(name) for name in (*PLAIN, *METHODS)}
    forward = known["plain forward"]
    counts, tokens = next(entry["windows"] for entry in known.values() if entry is not None)
    lines = [
        results.caption(f". A model of Llama-2-7B's shape, bf16, {counts} windows of {tokens} tokens"),
        "",
        "| | time | in plain forwards | GPU memory | host memory |",
        "|---|---|---|---|---|",
    ]
    for name, entry in known.items():
        if entry is None:
            lines.append(f"| {name} | not run yet | | | |")
            continue
        ratio = f"{entry['seconds'] / forward['seconds']:.1f}" if forward else ""
        lines.append(
            f"| {name} | {entry['seconds']:.0f} s | {ratio} | {entry['gpu_mib'] / 1024:.1f} GiB | {entry['peak_mib'] / 1024:.1f} GiB |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
