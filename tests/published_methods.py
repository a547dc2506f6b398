"""The published algorithms written plainly from their formulas, whole model in memory, to hold ours against.

Nothing here shares code with Secateur: statistics, loops over sequences and masks are spelled out as methods.md has them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def window_gradients(model: Any, ids_NT: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Plain backpropagation, one window after the other, the loss as transformers computes it from labels."""
    gradients = []
    for ids_T in ids_NT:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids_T[None], labels=ids_T[None], use_cache=False).loss.backward()
        gradients.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return gradients


@torch.no_grad()
def prune_block_by_block(model: Any, ids_NT: torch.Tensor, metric: Any, mask: Any) -> dict[str, torch.Tensor]:
    """Wanda's protocol (methods §0.1): one run with dense weights for statistics, prune, run again for the next block.

    Args:
        metric: (parameter name, weight, scaler_row) -> score.
        mask: score -> True where pruned.

    Returns:
        what was kept, by parameter name; ``model`` is pruned in place.
    """
    blocks = model.model.layers
    hidden, arguments = [], []

    class CatchError(Exception):
        pass

    def catcher(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        arguments.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        raise CatchError

    handle = blocks[0].register_forward_pre_hook(catcher, with_kwargs=True)
    for ids_T in ids_NT:
        with contextlib.suppress(CatchError):
            model(input_ids=ids_T[None], use_cache=False)
    handle.remove()
    kept = {}
    for index, block in enumerate(blocks):
        scaler: dict[str, torch.Tensor] = {}
        seen: dict[str, int] = {}

        def hook(name: str, scaler: Any = scaler, seen: Any = seen) -> Any:
            def add(module: nn.Module, args: Any, out: Any) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                n = seen.get(name, 0)
                row = scaler.get(name, torch.zeros(x.shape[1])) * (n / (n + 1))
                scaler[name] = row + x.norm(p=2, dim=0) ** 2 / (n + 1)
                seen[name] = n + 1

            return add

        handles = [module.register_forward_hook(hook(name)) for name, module in linears(block).items()]
        for h, kw in zip(hidden, arguments, strict=True):
            block(h, **kw)
        for handle in handles:
            handle.remove()
        for name, module in linears(block).items():
            full = f"model.layers.{index}.{name}.weight"
            gone = mask(metric(full, module.weight, scaler[name]))
            module.weight[gone] = 0
            kept[full] = ~gone
        hidden = [_first(block(h, **kw)) for h, kw in zip(hidden, arguments, strict=True)]
    return kept


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def wanda_metric(name: str, weight: torch.Tensor, scaler_row: torch.Tensor) -> torch.Tensor:
    return weight.abs() * torch.sqrt(scaler_row)


def folded_gradients(model: Any, ids_NT: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Over windows, for each parameter: sum of |g|, sum of g^2 and sum of g, by plain backpropagation."""
    folded: dict[str, dict[str, torch.Tensor]] = {"abs": {}, "square": {}, "signed": {}}
    for ids_T in ids_NT:
        (gradients,) = window_gradients(model, ids_T[None])
        for name, g in gradients.items():
            for kind, term in (("abs", g.abs()), ("square", g.square()), ("signed", g)):
                folded[kind][name] = folded[kind][name] + term if name in folded[kind] else term
    return folded


def gblm_metric(folded: dict[str, dict[str, torch.Tensor]], norm: str, alpha: float = 100.0) -> Any:
    """The published file holds norms of ``alpha``-scaled gradients over samples in 16 bits, without any 1/N."""

    def metric(name: str, weight: torch.Tensor, scaler_row: torch.Tensor) -> torch.Tensor:
        stored = eleven_bits(folded["abs" if norm == "l1" else "square"][name])
        size = alpha * (stored if norm == "l1" else stored.sqrt())
        return weight.abs() * torch.sqrt(scaler_row) + weight.abs() * size

    return metric


def eleven_bits(x: torch.Tensor) -> torch.Tensor:
    """Numbers as fp16 would hold them if its range were wide enough."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def lowest_of_rows(ratio: float) -> Any:
    def mask(score: torch.Tensor) -> torch.Tensor:
        gone = torch.zeros_like(score, dtype=torch.bool)
        order = torch.sort(score, dim=-1, stable=True).indices
        return gone.scatter_(1, order[:, : int(score.shape[1] * ratio)], True)

    return mask


def lowest_of_groups(remove: int, group: int) -> Any:
    def mask(score: torch.Tensor) -> torch.Tensor:
        gone = torch.zeros_like(score, dtype=torch.bool)
        for start in range(0, score.shape[1], group):
            lowest = torch.topk(score[:, start : start + group], remove, dim=1, largest=False).indices
            gone.scatter_(1, start + lowest, True)
        return gone

    return mask


def taylor_terms(
    model: Any, folded: dict[str, dict[str, torch.Tensor]], windows: int, order: str
) -> dict[str, torch.Tensor]:
    """Per-weight terms as in methods §14.2; ``vector`` keeps its sign."""
    terms = {}
    for name, parameter in model.named_parameters():
        if name not in folded["signed"]:
            continue
        weight = parameter.detach()
        mean, fisher = folded["signed"][name] / windows, folded["square"][name] / windows
        terms[name] = {
            "vector": weight * mean,
            "first": (weight * mean).abs(),
            "second": weight * fisher * weight,
            "mixed": (weight * mean - 0.5 * weight * fisher * weight).abs(),
        }[order]
    return terms


def channel_scores(terms: dict[str, torch.Tensor], block: int, order: str) -> torch.Tensor:
    """The score of each MLP channel of a Llama block: rows of gate and up, the column of down; looped over channels."""
    gate, up, down = (terms[f"model.layers.{block}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    scores = []
    for channel in range(gate.shape[0]):
        parts = [gate[channel].double().sum(), up[channel].double().sum(), down[:, channel].double().sum()]
        scores.append(sum(abs(p) for p in parts) if order == "vector" else sum(parts))
    return torch.stack([torch.as_tensor(s) for s in scores])


def head_scores(
    terms: dict[str, torch.Tensor], block: int, order: str, kv_heads: int, heads: int, width: int
) -> torch.Tensor:
    """The score of each KV group of a Llama block, looped over its rows and columns."""
    q, k, v, o = (terms[f"model.layers.{block}.self_attn.{name}_proj.weight"].double() for name in "qkvo")
    repeats = heads // kv_heads
    scores = []
    for group in range(kv_heads):
        total = 0.0
        rows = [(k, group * width + d) for d in range(width)] + [(v, group * width + d) for d in range(width)]
        rows += [(q, (group * repeats + r) * width + d) for r in range(repeats) for d in range(width)]
        for matrix, row in rows:
            part = float(matrix[row].sum())
            total += abs(part) if order == "vector" else part
        for r in range(repeats):
            for d in range(width):
                part = float(o[:, (group * repeats + r) * width + d].sum())
                total += abs(part) if order == "vector" else part
        scores.append(total)
    return torch.tensor(scores, dtype=torch.float64)
