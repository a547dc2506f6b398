"""What each of two processes does in ``test_sharding.py``, and the same recoveries for one process to be measured by."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import tiny_families
import torch
from tiny_recovery import learnable_windows, mask_half, mask_two_of_four, tiny_llama, weights
from torch import nn

from secateur.recovery import RecoverySettings, Teacher, checkpoints, recover_model, training
from secateur.recovery.lending import lent
from secateur.recovery.losses import next_token_loss
from secateur.recovery.places import block_parameters, blocks_of
from secateur.recovery.sharding import average_copies, is_shared, local, whole
from secateur.structure import find_all_units
from secateur.workers import ALONE, Workers, join

NO_DROPOUT = {"dropout": 0.0}  # it is drawn anew for every window, and each worker sees other ones
CASES: dict[str, tuple[str, Callable | None, dict]] = {
    "lora": ("lora", mask_half, NO_DROPOUT),
    "lora, dense": ("lora", None, NO_DROPOUT),
    "distill": ("distill:hidden=1", mask_two_of_four, NO_DROPOUT),
    "distill, full": ("distill:student=full", mask_half, {}),
    "full, half": ("full", mask_half, {"weight_decay": 0.1}),
    "full, 2:4": ("full", mask_two_of_four, {"weight_decay": 0.1}),
    "spp": ("spp", mask_half, NO_DROPOUT | {"learning_rate": 5e-2}),
    "lora-prune": ("lora-prune:every=1", None, NO_DROPOUT),
}
STEPS = 6


class Died(BaseException):
    """Stands in for ``kill -9``."""


def recovered(
    case: str, workers: Workers = ALONE, folder: Path | None = None, dies_at: int | None = None, dtype=torch.float32
) -> dict:
    """Recover a tiny model; what is given back is plain.

    Returns:
        the ``log`` of it, the ``weights`` after it, whether the model is ``plain`` again, the ``steps`` that were taken, which
        ``part`` of the blocks this worker had while it trained, and whether it ``died``.
    """
    method, mask, more = CASES[case]
    # Three blocks and odd widths: parts are not of one size.
    model = tiny_llama(dtype, num_hidden_layers=3, intermediate_size=52, mlp_bias=True)
    teacher = Teacher(tiny_llama(num_hidden_layers=3)) if method.startswith("distill") else None
    masks = mask(model) if mask else None
    structure = find_all_units(model, "model.layers") if method.startswith("lora-prune") else None
    given = {"learning_rate": 1e-2, "steps": STEPS, "batch_size": 8, "micro_batch": 2, "held_out": 4} | more
    before = {name: (type(p), p.dtype, id(p)) for name, p in model.named_parameters()}
    modules = [type(module) for module in model.modules()]
    held, steps, parts = sum(p.numel() for p in blocks_of(model).parameters()), [], []

    def on_step(step: int, *_: object) -> None:
        steps.append(step)
        shared = [p for p in blocks_of(model).parameters() if is_shared(p)]
        parts.append((sum(p.numel() for p in shared) / held, sum(local(p).numel() for p in shared) / held))
        if step == dies_at:
            raise Died

    log, died = None, False
    try:
        log = recover_model(
            model, learnable_windows(length=15), RecoverySettings(method=method, **given), masks, on_step, folder, teacher,
            structure, workers,
        )  # fmt: skip
    except Died:
        died = True
    lent = [model, *([teacher.model] if teacher else [])]
    plain = all(type(p) is nn.Parameter and not is_shared(p) for one in lent for p in one.parameters())
    plain &= before == {name: (type(p), p.dtype, id(p)) for name, p in model.named_parameters()}
    plain &= modules == [type(module) for module in model.modules()] and not any(
        m._forward_hooks for m in model.modules()
    )
    return {
        "log": log.to_json() if log else None,
        "weights": weights(model),
        "plain": plain,
        "steps": steps,
        "parts": parts[0],
        "died": died,
    }


class Kept:
    """How many bytes of weights of blocks autograd keeps from the forward pass to the backward pass, at most."""

    def __init__(self, trainer: type = training._StudentTrainer) -> None:
        self.bytes, self.trainer, self.real = 0, trainer, trainer.compute_loss

    def __enter__(self) -> Kept:
        sizes = {(o, i) for o, i in ((32, 32), (16, 32), (52, 32), (32, 52))}
        sizes |= {(i, o) for o, i in sizes}

        def compute_loss(trainer, *given, **named):
            storages = {}

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                if tuple(tensor.shape) in sizes and tensor.is_floating_point():
                    storages[id(tensor.untyped_storage()._cdata)] = tensor.untyped_storage()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = self.real(trainer, *given, **named)
            self.bytes = max(self.bytes, sum(storage.nbytes() for storage in storages.values()))
            return loss

        self.trainer.compute_loss = compute_loss
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.compute_loss = self.real


def in_16_bits(case: str, workers: Workers = ALONE) -> dict:
    """What an accelerator with bfloat16 does, on the CPU."""
    real, training.autocast_here = training.autocast_here, lambda: True
    try:
        with Kept() as kept:
            return recovered(case, workers) | {"kept": kept.bytes}
    finally:
        training.autocast_here = real


def dies_and_goes_on(case: str, workers: Workers, folder: Path, damage: str | None = None) -> dict:
    """A recovery that is interrupted in its fourth step and called again, with a checkpoint after every step."""
    checkpoints.LEAST_SECONDS, checkpoints.SHARE = 0.0, 0
    died = recovered(case, workers, folder, dies_at=4)
    if workers.leads and damage:
        (place,) = folder.glob("checkpoint-*")
        (place / damage).write_bytes((place / damage).read_bytes()[:-100])
    workers.wait()
    return {"died": died, "again": recovered(case, workers, folder)}


class Expert(nn.Module):
    """One of four matrices beside the usual one, by the first token of the first window."""

    chosen = 0

    def __init__(self, usual: nn.Linear) -> None:
        super().__init__()
        self.usual = usual
        sizes = (usual.in_features, usual.out_features)
        self.experts = nn.ModuleList(nn.Linear(*sizes, bias=bool(number % 2)) for number in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.usual(x) + self.experts[Expert.chosen](x)


def with_experts() -> nn.Module:
    """A model of whose experts each window reaches one, in the first block and in the last."""
    model = tiny_llama(num_hidden_layers=3)
    for block in (model.model.layers[0], model.model.layers[2]):
        block.mlp.up_proj = Expert(block.mlp.up_proj)

    def choose(_: nn.Module, given: tuple[torch.Tensor]) -> None:
        Expert.chosen = int(given[0][0, 0]) % 4

    model.get_input_embeddings().register_forward_pre_hook(choose)
    return model


def filled_copies(workers: Workers) -> list[torch.Tensor | None]:
    """Averages of gradients that both have, that the first has, that the second has, and that none has."""
    copies = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    for place in (0, 1 + workers.rank):
        copies[place].grad = torch.full((2,), 4.0 + place)
    average_copies(copies, workers)
    return [copy.grad for copy in copies]


def wrong_gradients(model: nn.Module, workers: Workers) -> list[str]:
    """Parameters whose gradient is not that of one process, when each worker has a window of its own."""
    windows = [
        torch.randint(3, 29, (1, 3), generator=torch.Generator().manual_seed(rank)) for rank in range(workers.size)
    ]
    for rank, ids_NT in enumerate(windows):
        ids_NT[0, 0] = 4 + rank
    for ids_NT in windows:
        (next_token_loss(model, ids_NT) / workers.size).backward()
    wanted = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in block_parameters(model).items()
    }
    model.zero_grad()
    with lent(model, workers):
        next_token_loss(model, windows[workers.rank]).backward()
        parameters = block_parameters(model)
        average_copies(parameters.values(), workers)
        found = {name: whole(parameter.grad) for name, parameter in parameters.items()}
    assert list(found) == list(wanted)
    return [name for name, gradient in wanted.items() if not torch.allclose(found[name], gradient, atol=1e-5)]


def main(folder: Path) -> None:
    workers = join(may_shard=True)
    assert workers.shards
    assert workers.size == 2
    found = {case: recovered(case, workers) for case in CASES}
    found["bf16"] = recovered("full, half", workers, dtype=torch.bfloat16)
    found["products"] = {case: in_16_bits(case, workers) for case in ("lora", "lora, dense", "full, half", "spp")}
    for case in ("full, half", "lora", "lora-prune"):
        found[f"{case}, interrupted"] = dies_and_goes_on(case, workers, folder / case)
    for file in ("optimizer_1.pt", "trained_1.safetensors"):
        found[file] = dies_and_goes_on("full, half", workers, folder / file, file)
    families = tiny_families.DECODERS | tiny_families.ROUTED_DECODERS
    found["families"] = {
        family: wrong_gradients(tiny_families.tiny(family).float().eval(), workers) for family in families
    }
    found["experts"] = wrong_gradients(with_experts(), workers)
    found["copies"] = filled_copies(workers)
    torch.save(found, folder / f"{workers.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
