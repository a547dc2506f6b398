"""Time and memory of finding every unit of large configs, without one weight in memory.

    python benchmarks/tracing.py

One thread, a process each; memory is the growth over the skeleton (transformers' own model on the meta device).
"""

from __future__ import annotations

from common import RESULTS, Results, fresh

CODE = """
import resource
from transformers import {config}
from secateur import console; console.quiet_libraries()
from secateur.checkpoint.skeleton import build_skeleton
from secateur.structure import find_all_units
skeleton = build_skeleton({config}(**{fields!r}))
find_all_units(build_skeleton({config}(**{narrow!r})).model, skeleton.blocks_name)  # what is imported at first use
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before, started = peak(), time.process_time()
structure = find_all_units(skeleton.model, skeleton.blocks_name)
result = dict(seconds=time.process_time() - started, grown_mib=peak() - before, groups=len(structure.units))
"""

LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
LLAMA_70B = dict(
    hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256
)
NARROW = dict(hidden_size=128, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=4)
CASES = {
    "Llama-2-7B": ("LlamaConfig", LLAMA_7B | {"num_hidden_layers": 32}),
    "Llama-3-70B": ("LlamaConfig", LLAMA_70B | {"num_hidden_layers": 80}),
    "DeepSeek-V3 (671B, as by default)": ("DeepseekV3Config", {}),
}


def main() -> None:
    results = Results("tracing", "python benchmarks/tracing.py")
    for name, (config, fields) in CASES.items():
        if results.get(name) is None:
            code = CODE.format(config=config, fields=fields, narrow=NARROW)
            results.put(name, fresh(code, threads=1))
    machine = results.content["machine"]
    lines = [
        f"`{results.content['command']}`: {machine['processor']}, torch {machine['torch']}, transformers {machine['transformers']}, one thread.",
        "",
        "| config | processor time | memory beyond the skeleton | unit groups | date |",
        "|---|---|---|---|---|",
    ]
    for name, entry in results.content["entries"].items():
        lines.append(
            f"| {name} | {entry['seconds']:.2f} s | {entry['grown_mib']:.0f} MiB | {entry['groups']} | {entry['date']} |"
        )
    (RESULTS / "tracing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
