"""Where gradients come from, on SmolLM2-135M: how well block-local and forward-only ones stand for exact ones.

    python benchmarks/gradient_sources.py [--reference DIR] [--queries 1 4 16 64] [--windows 8] [--tokens 128] [--evaluated 10]

For element Taylor and for FMS, unsigned and signed, every unit is scored with gradients of each source on the same calibration windows.
Said is the Spearman rank correlation with the scores by exact gradients: of the channels of a block (1536) and of its query
heads (9), mean over blocks, and of the KV groups (3 a block) over the whole model; beside it the correlation of weight x
activation, which needs no gradient, with the same exact scores. Fewer queries are the first of the most asked for, which is measured
once. Then the lowest channels of every block are zeroed, which computes what cutting them does, and perplexity is measured on the
first windows of WikiText-2 test. Results are kept as they come; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from common import DEFAULT_REFERENCE, RESULTS, Results, fresh
from safetensors.torch import load_file, save_file

from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.checkpoint.source import resolve_model
from secateur.recipe import recipe_from
from secateur.scoring import BlockScorer, unit_key
from secateur.structure import find_all_units
from secateur.sweep import Queries, Sweep, SweepSettings
from secateur.sweep.forward_only import ForwardOnlyWalk

SCORES = ("taylor", "taylor:order=vector", "fms", "fms:signed=true")
EVALUATED = ("taylor", "fms")
YARDSTICK = "wanda"
KINDS = ("channel", "query", "head")
RATIOS = (0.2, 0.5)
MEMORY = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--queries", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--evaluated", type=int, default=10, help="windows of 512 tokens to measure perplexity on")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/gradient_sources"))
    parser.add_argument("--name", default="gradient_sources", help="of the files with the results")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    sizes = f"--windows {arguments.windows} --tokens {arguments.tokens} --evaluated {arguments.evaluated}"
    results = Results(arguments.name, f"python benchmarks/gradient_sources.py {sizes}")
    places = {name: str((arguments.reference / f"{name}-tokens.safetensors").resolve()) for name in READ}
    setting = {
        "windows": arguments.windows,
        "tokens": arguments.tokens,
        "work": str(arguments.work.resolve()),
        **places,
    }

    budgets = sorted(arguments.queries)
    sources = [YARDSTICK, "exact", "block", *(f"forward {count}" for count in budgets)]
    if budgets:
        _do(results, "measuring", "measure_quotients", setting | {"count": budgets[-1]})
    for source in sources:
        _do(results, f"scores {source}", "measure_scores", setting | {"source": source})
    for source in sources[:1] + sources[2:]:
        _do(results, f"correlation {source}", "correlate", setting | {"source": source})
    evaluated = {"count": arguments.evaluated, **setting}
    for source in ("dense", *sources):
        if source not in sources[4:-1]:  # of forward runs the least and the most show where the rest lies
            _do(results, f"perplexity {source}", "measure_perplexity", evaluated | {"source": source})
            (RESULTS / f"{arguments.name}.md").write_text(table(results, budgets))
    (RESULTS / f"{arguments.name}.md").write_text(table(results, budgets))
    print(table(results, budgets))


READ = ("calibration", "evaluation")


def _do(results: Results, key: str, function: str, setting: dict[str, Any]) -> None:
    """Call one of the functions below in a process of its own, unless its entry is there."""
    if results.get(key) is None:
        print(f"{key} ...", flush=True)
        code = f"from gradient_sources import {function}\nresult = {function}(**{setting!r})"
        results.put(key, fresh(code, threads=1))


def _opened(setting: dict[str, Any]) -> tuple[Checkpoint, torch.Tensor]:
    from secateur import console

    console.quiet_libraries()
    ids_NT = load_file(setting["calibration"])["input_ids"][: setting["windows"], : setting["tokens"]]
    return open_checkpoint(str(resolve_model("smollm2").folder)), ids_NT


def measure_quotients(count: int, **setting: Any) -> dict[str, Any]:
    """The loss along ``count`` directions, all windows; kept for every smaller number of queries."""
    checkpoint, ids_NT = _opened(setting)
    work = Path(setting["work"])
    settings = SweepSettings(1, MEMORY, work / "scratch", gradient="forward", queries=Queries(count))
    walk = ForwardOnlyWalk(checkpoint, ids_NT, settings)
    started = time.perf_counter()
    quotients_QN = walk.measure_QN(range(len(checkpoint.skeleton.blocks)))
    save_file({"quotients": quotients_QN}, work / "quotients.safetensors")
    walk.forget()
    return {"seconds": time.perf_counter() - started, "queries": count}


def measure_scores(source: str, **setting: Any) -> dict[str, Any]:
    """Scores of all units by one source, ``(blocks, units)`` float64 by criterion and kind."""
    checkpoint, ids_NT = _opened(setting)
    work, skeleton = Path(setting["work"]), checkpoint.skeleton
    scores = (YARDSTICK,) if source == YARDSTICK else SCORES
    recipes = [recipe_from(model="smollm2", criterion=score, unit="head,query,channel") for score in scores]
    units = find_all_units(skeleton.model, skeleton.blocks_name)
    found: dict[str, list[torch.Tensor]] = {}

    def visit(index: int, block: Any, statistics: Any) -> None:
        groups = [group for group in units.of_block(index) if group.kind in KINDS]
        for score, recipe in zip(scores, recipes, strict=True):
            values = BlockScorer(skeleton, index, block, statistics, recipe).of_units(groups)
            for group in groups:
                found.setdefault(f"{score}|{group.kind}", []).append(values[unit_key(group)])

    gradient, _, count = source.partition(" ")
    queries = Queries(int(count)) if count else Queries()
    if count:  # fewer queries are the first of more, bit for bit
        kept_QN = load_file(work / "quotients.safetensors")["quotients"][: queries.count]
        ForwardOnlyWalk.measure_QN = lambda self, blocks: kept_QN  # type: ignore[method-assign]
    wanted = "exact" if source == YARDSTICK else gradient
    settings = SweepSettings(1, MEMORY, work / "scratch", gradient=wanted, queries=queries)
    needs = frozenset().union(*(recipe.parsed_criterion().needs() for recipe in recipes))
    started = time.perf_counter()
    Sweep(checkpoint, ids_NT, settings).dense(needs, range(len(skeleton.blocks)), visit)
    seconds = time.perf_counter() - started
    if source == "exact":  # visited last to first
        found = {key: values[::-1] for key, values in found.items()}
    save_file({key: torch.stack(values) for key, values in found.items()}, work / f"scores {source}.safetensors")
    return {"seconds": seconds}


def correlate(source: str, **setting: Any) -> dict[str, Any]:
    """Spearman's rank correlation of one source's scores with those by exact gradients."""
    exact, other = (load_file(Path(setting["work"]) / f"scores {name}.safetensors") for name in ("exact", source))
    result = {}
    for score in SCORES:
        for kind in KINDS:
            left_BU = exact[f"{score}|{kind}"]
            right_BU = other[f"{YARDSTICK if source == YARDSTICK else score}|{kind}"]
            if kind == "head":
                left_BU, right_BU = left_BU.reshape(1, -1), right_BU.reshape(1, -1)
            pairs = zip(left_BU, right_BU, strict=True)
            result[f"{score}|{kind}"] = sum(spearman(*pair) for pair in pairs) / len(left_BU)
    return {"correlations": result}


def spearman(left_U: torch.Tensor, right_U: torch.Tensor) -> float:
    """The correlation of ranks; scores are float64, so that ties do not matter."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (left_U, right_U)])
    return float(torch.corrcoef(ranks)[0, 1])


@torch.no_grad()
def measure_perplexity(source: str, count: int, **setting: Any) -> dict[str, Any]:
    """Perplexity with the lowest channels of every block zeroed, by score and ratio."""
    from transformers import AutoModelForCausalLM

    _opened(setting)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2").folder, dtype=torch.float32).eval()
    windows = load_file(setting["evaluation"])["input_ids"][:count]
    found = {}
    for score, ratio in cases(source):
        found[f"{score}|{ratio}"] = perplexity_without(model, windows, lowest(setting, source, score, ratio))
    return {"perplexity": found}


def cases(source: str) -> list[tuple[str, float]]:
    """The scores and ratios at which a source's perplexity is measured."""
    if source == "dense":
        return [("", 0.0)]
    return [(score, ratio) for score in ((YARDSTICK,) if source == YARDSTICK else EVALUATED) for ratio in RATIOS]


def lowest(setting: dict[str, Any], source: str, score: str, ratio: float) -> list[torch.Tensor]:
    """The channels that leave, block by block; of the dense model none."""
    if source == "dense":
        return []
    scores_BU = load_file(Path(setting["work"]) / f"scores {source}.safetensors")[f"{score}|channel"]
    return [scores_U.argsort(stable=True)[: int(len(scores_U) * ratio)] for scores_U in scores_BU]


def perplexity_without(model: Any, windows_NT: torch.Tensor, leaving: list[torch.Tensor]) -> float:
    """Perplexity while these channels of every block are zeros."""
    matrices = [layer.mlp.down_proj.weight for layer in model.model.layers][: len(leaving)]
    before = [weight.clone() for weight in matrices]
    for weight, channels in zip(matrices, leaving, strict=True):
        weight[:, channels] = 0
    losses = [float(model(input_ids=w[None], labels=w[None], use_cache=False).loss) for w in windows_NT]
    for weight, whole in zip(matrices, before, strict=True):
        weight.copy_(whole)
    return math.exp(sum(losses) / len(losses))


def table(results: Results, budgets: list[int]) -> str:
    """The results as Markdown."""
    sources = [YARDSTICK, "block", *(f"forward {count}" for count in budgets), "exact"]
    lines = [
        f"{results.caption('; one seed')} `forward Q` has Q queries; `{YARDSTICK}` is weight x activation, without a gradient.",
        "",
        "Spearman correlation with the scores by exact gradients (channels and query heads: mean over blocks; KV groups: over the model):",
        "",
        "| score | units | " + " | ".join(sources[:-1]) + " |",
        "|---|---|" + "---|" * (len(sources) - 1),
    ]
    for score in SCORES:
        for kind in KINDS:
            entries = [results.get(f"correlation {source}") for source in sources[:-1]]
            values = [f"{entry['correlations'][f'{score}|{kind}']:.2f}" if entry else "not run" for entry in entries]
            lines.append(f"| {score} | {kind} | " + " | ".join(values) + " |")
    dense = results.get("perplexity dense")
    lines += [
        "",
        f"Perplexity with a share of the channels gone (dense: {dense['perplexity']['|0.0']:.2f}):"
        if dense
        else "Perplexity:",
        "",
        "| gradients | score | 20 % | 50 % |",
        "|---|---|---|---|",
    ]
    for source in sources:
        entry = results.get(f"perplexity {source}")
        if entry is not None:
            for score in dict.fromkeys(score for score, _ in cases(source)):
                values = [f"{entry['perplexity'][f'{score}|{ratio}']:.2f}" for ratio in RATIOS]
                lines.append(f"| {'none' if source == YARDSTICK else source} | {score} | " + " | ".join(values) + " |")
    lines += ["", "One thread; the wall clock of a machine that others shared, so seconds are an upper bound:", ""]
    lines += ["| scores by | seconds | peak memory |", "|---|---|---|"]
    timed = {"measuring": "the loss along all queries, once"} | {f"scores {s}": s for s in sources}
    for key, name in timed.items():
        entry = results.get(key)
        if entry is not None:
            lines.append(f"| {name} | {entry['seconds']:.1f} | {entry['peak_mib']:.0f} MiB |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
