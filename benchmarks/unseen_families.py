"""Units found and proved in every other family that transformers knows: no test names them, no code was written for them.

    python benchmarks/unseen_families.py

Every config class of transformers' causal language models is given the same tiny sizes under whatever names it has for them; those
that refuse these sizes, or cannot be made small, are counted as not tried. Each runs in a process of its own, one thread, two minutes at most.
"""

from __future__ import annotations

import inspect
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Results

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SIZES: dict[str, Any] = {
    "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 3, "hidden_size": 64,
    "intermediate_size": 48, "max_position_embeddings": 64, "num_attention_heads": 4,
}  # fmt: skip
OTHER_NAMES: dict[str, Any] = {
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "moe_num_experts": 6, "moe_k": 2, "moe_topk": 2, "n_group": 2, "topk_group": 1, "n_embd": 64, "n_layer": 3,
    "n_head": 4, "n_positions": 64, "n_inner": 48, "d_model": 64, "n_layers": 3, "n_heads": 4, "ffn_dim": 48, "ffn_hidden_size": 48,
    "word_embed_proj_dim": 64, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_layers": 3, "num_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "is_decoder": True,
    "shared_expert_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"head_dim": None}, {"num_key_value_heads": None}, {"num_key_value_heads": None, "head_dim": None},
    {"num_key_value_heads": 4, "head_dim": 8},
)  # fmt: skip
"""Changes to those sizes, tried until a family takes them: latent attention has a key head for every query head."""

LARGEST = 30_000_000
TIME_LIMIT_S = 120


def tiny_configs(config_class: Any) -> Iterator[Any]:
    """Configs with tiny sizes, or in words why there is none."""
    known = inspect.signature(config_class).parameters
    fields = SIZES | {name: value for name, value in OTHER_NAMES.items() if name in known}
    for changes in VARIANTS:
        changed = fields | {name: value for name, value in changes.items() if name in known}
        try:
            yield config_class(**{name: value for name, value in changed.items() if value is not None})
        except Exception as error:  # strict configs raise whatever they like
            yield " ".join(str(error).split())[:100]


def look_at(config_class: Any) -> dict[str, Any]:
    """What becomes of one family, in the first sizes that it takes."""
    found = []
    for config in tiny_configs(config_class):
        found.append({"outcome": "not tried", "why": config} if isinstance(config, str) else outcome_of(config))
        if found[-1]["outcome"] in ("proved", "partly"):
            return found[-1]
    return next((entry for entry in found if entry["outcome"] == "refused"), found[0])


def outcome_of(config: Any) -> dict[str, Any]:
    """What becomes of one config."""
    from secateur.checkpoint.skeleton import build_skeleton
    from secateur.errors import ModelError, StructureError
    from secateur.proof import prove_all
    from secateur.structure import find_all_units

    try:
        skeleton = build_skeleton(config)
    except (ModelError, StructureError) as error:
        return {"outcome": "not tried", "why": str(error)[:100]}
    parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    if parameters > LARGEST:
        return {"outcome": "not tried", "why": f"{parameters:,} parameters: sizes under names of their own"}
    try:
        structure = find_all_units(skeleton.model, skeleton.blocks_name)
        proofs = list(prove_all(skeleton, structure))
    except StructureError as error:
        return {"outcome": "refused", "why": str(error)}
    failed = [f"{proof.kind} {proof.case}: {proof.problem}" for proof in proofs if not proof.holds]
    kinds = sorted({proof.kind for proof in proofs if proof.holds} - {"all together"})
    entry = {"kinds": kinds, "proved": len(proofs) - len(failed), "refused": len(structure.refused)}
    outcome = "proved" if not failed else "partly" if kinds else "refused"
    return entry | {"outcome": outcome, "why": "; ".join(failed)}


def _report(config_class: Any, connection: Any) -> None:
    torch.set_num_threads(1)
    try:
        connection.send(look_at(config_class))
    except BaseException as error:  # a defect of ours: the table has to show it
        connection.send({"outcome": "escaped", "why": f"{type(error).__name__}: {error}"[:300]})


def in_own_process(config_class: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(config_class, there))
    process.start()
    try:
        return here.recv() if here.poll(TIME_LIMIT_S) else {"outcome": "escaped", "why": f"more than {TIME_LIMIT_S} s"}
    except EOFError:
        return {"outcome": "escaped", "why": "the process died"}
    finally:
        process.kill()
        process.join()


def unseen() -> Iterator[Any]:
    from family_configs import FAMILIES
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    tested = {family.config for family in FAMILIES.values()}
    yield from (kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING if kind.__name__ not in tested)


def table(results: Results) -> str:
    entries, machine = results.content["entries"], results.content["machine"]
    names = {outcome: [n for n, e in entries.items() if e["outcome"] == outcome] for outcome in OUTCOMES}
    tried = len(entries) - len(names["not tried"])
    lines = [
        f"`{results.content['command']}`: transformers {machine['transformers']}, torch {machine['torch']}.",
        "",
        f"{tried} families tried: {', '.join(f'{len(names[o])} {said}' for o, said in OUTCOMES.items() if o != 'not tried')}; "
        f"{len(names['not tried'])} not tried, because they refuse the sizes or name them otherwise.",
        "",
        "| config | outcome | kinds proved | cuts proved | why |",
        "|---|---|---|---|---|",
    ]
    for outcome in OUTCOMES:
        for name in names[outcome]:
            entry = entries[name]
            why = entry["why"].replace("|", "/")
            short = why if len(why) <= 220 else why[:220] + " ..."
            lines.append(
                f"| `{name}` | {OUTCOMES[outcome]} | {', '.join(entry.get('kinds', []))} | {entry.get('proved', '')} | {short} |"
            )
    return "\n".join(lines) + "\n"


OUTCOMES = {
    "proved": "proved in every kind of unit that was found",
    "partly": "proved in part, the rest refused",
    "refused": "refused by name",
    "escaped": "failed without a sentence",
    "not tried": "not tried",
}


def main() -> None:
    from secateur.console import quiet_libraries

    quiet_libraries()
    results = Results("unseen_families", "python benchmarks/unseen_families.py")
    for config_class in unseen():
        name = config_class.__name__
        if results.get(name) is None:
            results.put(name, in_own_process(config_class))
            print(name, results.content["entries"][name]["outcome"], flush=True)
    (RESULTS / "unseen_families.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
