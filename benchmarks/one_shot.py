"""One-shot methods on SmolLM2-135M with the reference windows: time, memory, perplexity, and agreement with published code.

    python benchmarks/one_shot.py [--reference DIR] [--only NAME ...]

Each method runs as a user would run it (`secateur prune`, cold cache, default threads) in a process of its own, beside one
plain forward and one plain forward and backward over the same windows. Perplexity is that of the reference: exp of the
mean next-token cross-entropy over 40 windows of 512 tokens of WikiText-2 test. "Agreement" holds the masks, or the units
that left, against the published algorithm written out plainly (tests/published_methods.py) on the same windows. Results
are kept as they come; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from common import DEFAULT_REFERENCE, RESULTS, Results, fresh

from secateur.checkpoint.source import resolve_model

PRELUDE = """
import torch
from pathlib import Path
from safetensors.torch import load_file
from secateur import console; console.quiet_libraries()
ids = load_file({calibration!r})["input_ids"]
"""

FORWARD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32).eval()
started = time.perf_counter()
for batch in ids.split(4):
    if {backward}:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    else:
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
result = dict(seconds=time.perf_counter() - started)
"""

PRUNE = """
import secateur
started = time.perf_counter()
record = secateur.prune({folder!r}, {out!r}, calibration={calibration!r}, overwrite=True, **{fields!r}).record
result = dict(seconds=time.perf_counter() - started, reached=record["reached"], stages=record["stages"])
"""

PERPLEXITY = """
from secateur import loading
from secateur.calibration import text_windows
from secateur.evaluation import perplexity
windows = text_windows({evaluation!r}, Path({out!r}))
result = dict(perplexity=perplexity(loading.load({out!r}), windows).value)
"""

AGREEMENT = """
import published_methods as published
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32).eval()
for name, parameter in model.named_parameters():
    parameter.requires_grad_("layers." in name and parameter.dim() == 2)
case = {case!r}
if case["kind"] == "mask":
    metric = published.wanda_metric
    if case["norm"]:
        metric = published.gblm_metric(published.folded_gradients(model, ids), case["norm"])
    mask = published.lowest_of_groups(*case["groups"]) if case["groups"] else published.lowest_of_rows(case["ratio"])
    kept = published.prune_block_by_block(model, ids, metric, mask)
    ours = load_file({out!r} + "/model.safetensors")
    dense = load_file({folder!r} + "/model.safetensors")
    # a weight that was zero already cannot be told apart from one that was masked
    different = sum(int(((ours[n] != 0) != k)[dense[n] != 0].sum()) for n, k in kept.items())
    total = sum(k.numel() for k in kept.values())
    with torch.no_grad():
        import math
        windows = load_file({evaluation!r})["input_ids"]
        losses = [float(model(input_ids=w[None], labels=w[None], use_cache=False).loss) for w in windows]
    result = dict(different_share=different / total, published_perplexity=math.exp(sum(losses) / len(losses)))
else:
    terms = published.taylor_terms(model, published.folded_gradients(model, ids), len(ids), case["order"])
    import json
    plan = json.loads(Path({out!r}, "secateur/plan.json").read_text())
    different = total = 0
    for entry in plan["blocks"]:
        scores = published.channel_scores(terms, entry["block"], case["order"])
        cut = entry["cuts"][0]
        expected = set(scores.argsort()[: len(cut["removed"])].tolist())
        different += len(expected ^ set(cut["removed"]))
        total += cut["count"]
    result = dict(different_share=different / total)
"""

MASK = {"kind": "mask", "norm": None, "groups": None, "ratio": 0.5}
METHODS: dict[str, tuple[dict, dict | None]] = {
    "magnitude 50 % (layer)": ({"criterion": "magnitude", "unit": "weight", "within": "layer", "ratio": 0.5}, None),
    "magnitude 50 % (row)": ({"criterion": "magnitude", "unit": "weight", "ratio": 0.5}, None),
    "wanda 50 %": ({"criterion": "wanda", "unit": "weight", "ratio": 0.5}, MASK),
    "gblm 50 %": ({"criterion": "gblm", "unit": "weight", "ratio": 0.5}, MASK | {"norm": "l1"}),
    "gblm l2 50 %": ({"criterion": "gblm:norm=l2", "unit": "weight", "ratio": 0.5}, MASK | {"norm": "l2"}),
    "taylor 50 %": ({"criterion": "taylor", "unit": "weight", "ratio": 0.5}, None),
    "wanda 2:4": ({"criterion": "wanda", "unit": "2:4"}, MASK | {"groups": (2, 4)}),
    "gblm 2:4": ({"criterion": "gblm", "unit": "2:4"}, MASK | {"groups": (2, 4), "norm": "l1"}),
    "random channels 25 %": ({"criterion": "random", "unit": "channel", "ratio": 0.25}, None),
    "magnitude channels 25 %": ({"criterion": "magnitude", "unit": "channel", "ratio": 0.25}, None),
    "wanda channels 25 %": ({"criterion": "wanda", "unit": "channel", "ratio": 0.25}, None),
    "taylor channels 25 %": (
        {"criterion": "taylor", "unit": "channel", "ratio": 0.25},
        {"kind": "units", "order": "first"},
    ),
    "taylor mixed channels 25 %": (
        {"criterion": "taylor:order=mixed", "unit": "channel", "ratio": 0.25},
        {"kind": "units", "order": "mixed"},
    ),
    "taylor vector channels 25 %": (
        {"criterion": "taylor:order=vector", "unit": "channel", "ratio": 0.25},
        {"kind": "units", "order": "vector"},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--only", nargs="*", help="methods to run; the others are taken from earlier results")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    results = Results("one_shot", "python benchmarks/one_shot.py")
    places = {
        "folder": str(resolve_model("smollm2").folder),
        "calibration": str((arguments.reference / "calibration-tokens.safetensors").resolve()),
        "evaluation": str((arguments.reference / "evaluation-tokens.safetensors").resolve()),
        "out": str(work / "pruned"),
    }
    prelude = PRELUDE.format(**places)
    for name, backward in (("plain forward", False), ("plain forward and backward", True)):
        if results.get(name) is None:
            results.put(name, fresh(prelude + FORWARD.format(backward=backward, **places)))
    if results.get("dense") is None:
        results.put("dense", fresh(prelude + PERPLEXITY.format(**places | {"out": places["folder"]})))
    for name, (fields, case) in METHODS.items():
        if results.get(name) is not None or (arguments.only and name not in arguments.only):
            continue
        print(f"running {name} ...", flush=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        code = prelude + PRUNE.format(fields=fields, **places)
        entry = fresh(code, SECATEUR_CACHE=str(work / "cache"))
        entry["perplexity"] = fresh(prelude + PERPLEXITY.format(**places))["perplexity"]
        if case is not None:
            agreement = fresh(prelude + AGREEMENT.format(case=case, **places))
            entry |= {key: agreement[key] for key in ("different_share", "published_perplexity") if key in agreement}
        results.put(name, entry)
    shutil.rmtree(work / "pruned", ignore_errors=True)
    (RESULTS / "one_shot.md").write_text(table(results))
    print(table(results))


def table(results: Results) -> str:
    """The results as Markdown, times as multiples of one plain forward."""
    forward = results.content["entries"]["plain forward"]["seconds"]
    machine = results.content["machine"]
    lines = [
        f"`{results.content['command']}`: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"torch {machine['torch']}, transformers {machine['transformers']}; calibration 32 × 256 tokens, perplexity on 40 × 512 tokens of "
        "WikiText-2 test, fp32.",
        "",
        "| method | perplexity | published code, same windows | places that differ | choosing, in plain forwards | whole command | peak memory | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("plain forward", "plain forward and backward", "dense", *METHODS):
        entry = results.get(name)
        if entry is None:
            lines.append(f"| {name} | not run yet | | | | | | |")
            continue
        choosing = (
            entry["stages"]["choosing"] if "stages" in entry else entry["seconds"] if name.startswith("plain") else None
        )
        cells = [
            name,
            _number(entry.get("perplexity")),
            _number(entry.get("published_perplexity")),
            f"{100 * entry['different_share']:.4f} %" if "different_share" in entry else "",
            f"{choosing / forward:.2f}" if choosing is not None else "",
            f"{entry['seconds']:.0f} s" if name != "dense" else "",
            f"{entry['peak_mib']:.0f} MiB" if name != "dense" else "",
            entry["date"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
