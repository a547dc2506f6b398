"""Peak memory against depth: exact gradients with one block in memory beside plain backpropagation.

    python benchmarks/depth.py [--blocks 8 16 32 64] [--windows 4] [--tokens 256]

Models of SmolLM2-135M's width, vocabulary and all, with random fp32 weights and as many blocks as asked, made a block at a time. Both ways gather
the gradient of the mean loss of every matrix in the blocks (`secateur.statistics.GradientMean`), each in a process of its own on one thread; the
peak is the kernel's (VmHWM), mapped pages of files and the interpreter with its libraries included. Streamed runs once with nothing
allowed beyond what cannot be done without, and once with 256 MiB for what may be kept between blocks. The chart is docs/memory-by-depth.svg.
Flat means that the largest peak is at most 5 % above the smallest.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from chart import Line, line_chart
from common import RESULTS, ROOT, Results, fresh
from gradients import LOAD, PLAIN, STREAMED
from safetensors.torch import save_file

from secateur.checkpoint.source import resolve_model

FLAT = 1.05
SPARE = 256 << 20
WAYS = {
    "plain": ("plain backpropagation", PLAIN, {}, "#cf222e", "square"),
    "streamed, 256 MiB": ("streamed, 256 MiB allowed to keep", STREAMED, {"memory": SPARE}, "#8250df", "diamond"),
    "streamed": ("streamed, nothing kept", STREAMED, {"memory": 0}, "#0969da", "circle"),
}


def make_model(folder: Path, blocks: int) -> Path:
    """SmolLM2's config with so many blocks and random weights, a file a block; nothing where it is there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(resolve_model("smollm2").folder)
    layers = config.num_hidden_layers
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * -(-blocks // layers))[:blocks]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for shard in range(-1, blocks):  # -1: what is outside the blocks
        inside = f"model.layers.{shard}."
        names = [n for n in shapes if (n.startswith(inside) if shard >= 0 else not n.startswith("model.layers."))]
        file = f"model-{shard + 2:05d}-of-{blocks + 1:05d}.safetensors"
        tensors = {name: random_tensor(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1) + "\n")
    return folder


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers for matrices; norms are ones."""
    return torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/depth"))
    parser.add_argument("--name", default="depth", help="of the files with the results")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "memory-by-depth.svg")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((resolve_model("smollm2").folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    windows = work / "windows.safetensors"
    ids_NT = torch.randint(vocabulary, (arguments.windows, arguments.tokens), generator=generator)
    save_file({"input_ids": ids_NT}, windows)
    sizes = f"--windows {arguments.windows} --tokens {arguments.tokens}"
    results = Results(arguments.name, f"python benchmarks/depth.py {sizes}")
    for blocks in arguments.blocks:
        todo = [way for way in WAYS if results.get(f"{blocks}: {way}") is None]
        folder = make_model(work / f"blocks-{blocks}", blocks) if todo else None
        for way in todo:
            _, code, options, _, _ = WAYS[way]
            shared = {"folder": str(folder), "windows": str(windows), "count": arguments.windows, "micro_batch": 1}
            entry = fresh((LOAD + code).format(**shared, save="", **options), threads=1)
            results.put(f"{blocks}: {way}", entry | {"blocks": blocks, "way": way})
            print(f"{blocks:3} blocks  {way:18} {entry['peak_mib']:7.0f} MiB  {entry['seconds']:6.1f} s", flush=True)
        shutil.rmtree(work / f"blocks-{blocks}", ignore_errors=True)
    (RESULTS / f"{arguments.name}.md").write_text(table(results))
    arguments.chart.write_text(chart(results, arguments.windows, arguments.tokens))
    print(table(results))


def peaks(results: Results, way: str) -> list[tuple[float, float]]:
    """Blocks and MiB of one way."""
    found = results.content["entries"].values()
    return sorted((entry["blocks"], entry["peak_mib"]) for entry in found if entry["way"] == way)


def table(results: Results) -> str:
    """The results as Markdown."""
    depths = sorted({entry["blocks"] for entry in results.content["entries"].values()})
    lines = [
        results.caption("; one thread, peak memory (VmHWM) and seconds of the gradients"),
        "",
        "| | " + " | ".join(f"{blocks} blocks" for blocks in depths) + " | largest / smallest |",
        "|---|" + "---|" * (len(depths) + 1),
    ]
    for way, (name, *_) in WAYS.items():
        cells = []
        for blocks in depths:
            entry = results.get(f"{blocks}: {way}")
            cells.append(f"{entry['peak_mib']:.0f} MiB, {entry['seconds']:.1f} s" if entry else "not run")
        values = [peak for _, peak in peaks(results, way)]
        ratio = max(values) / min(values) if values else 0
        verdict = "" if way == "plain" else " (flat)" if ratio <= FLAT else f" (over {FLAT:g})"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio:.3f}{verdict} |")
    return "\n".join(lines) + "\n"


def chart(results: Results, windows: int, tokens: int) -> str:
    """Peak memory by depth."""
    lines = [
        Line(name, peaks(results, way), colour, marker)
        for way, (name, _, _, colour, marker) in WAYS.items()
        if peaks(results, way)
    ]
    return line_chart(
        "Exact gradients: peak memory by depth",
        f"Models of SmolLM2-135M's width, fp32, {windows} windows of {tokens} tokens, one at a time; whole process (VmHWM)",
        "decoder blocks",
        "peak memory, MiB",
        lines,
    )


if __name__ == "__main__":
    main()
