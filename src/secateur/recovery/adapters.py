"""LoRA adapters on a model's decoder blocks: put on, masked where the model is sparse, folded in, taken off.

Importing this file imports peft, so ``lora.py`` does it late.

Shape legend: ``B`` batch, ``T`` tokens, ``I`` input features, ``O`` output features, ``R`` LoRA rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.recovery.sharding import placed_like, whole


class _MaskedLinear(torch.autograd.Function):
    """``y = F.linear(x, W + M * s(B A), bias)`` that keeps no ``(O, I)`` matrix for the backward pass.

    Plain autograd would hold one dense delta per layer from forward to backward: a second copy of the whole model.
    Recomputing ``B A`` costs 1 / tokens of the layer itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        lora_A_RI: Tensor,
        lora_B_OR: Tensor,
        mask_OI: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(x_BTI, weight_OI, lora_A_RI, lora_B_OR, mask_OI)
        ctx.scaling, ctx.autocast = scaling, _autocast_of(x_BTI)
        return F.linear(x_BTI, _masked_weight(weight_OI, lora_A_RI, lora_B_OR, mask_OI, scaling), bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_BTO,) = gradients
        x_BTI, weight_OI, lora_A_RI, lora_B_OR, mask_OI = ctx.saved_tensors
        gradient_x_BTI = None
        with torch.autocast(**ctx.autocast):  # as in the forward pass
            if ctx.needs_input_grad[0]:
                gradient_x_BTI = gradient_BTO @ _masked_weight(weight_OI, lora_A_RI, lora_B_OR, mask_OI, ctx.scaling)
            gradient_OI = gradient_BTO.flatten(0, -2).T @ x_BTI.flatten(0, -2)
            gradient_OI = gradient_OI.masked_fill_(~mask_OI, 0.0).mul_(ctx.scaling)
            gradient_A_RI, gradient_B_OR = lora_B_OR.T @ gradient_OI, gradient_OI @ lora_A_RI.T
        return gradient_x_BTI, None, None, gradient_A_RI, gradient_B_OR, None, None


def _autocast_of(tensor: Tensor) -> dict[str, Any]:
    """The state of autocast where ``tensor`` is."""
    kind = tensor.device.type
    enabled = torch.is_autocast_enabled(kind)
    return {"device_type": kind, "enabled": enabled, "dtype": torch.get_autocast_dtype(kind) if enabled else None}


def _masked_weight(
    weight_OI: Tensor | None, lora_A_RI: Tensor, lora_B_OR: Tensor, mask_OI: Tensor, scaling: float
) -> Tensor:
    """``W + M * s(B A)``, or the masked delta alone without ``W``; the same arithmetic as peft's delta."""
    delta_OI = (lora_B_OR @ lora_A_RI * scaling).masked_fill_(~mask_OI, 0.0)
    return delta_OI if weight_OI is None else weight_OI + delta_OI


class MaskedLoraLinear(LoraLinear):
    """A LoRA layer that cannot revive pruned weights: its delta is ``M * s(B A)`` in training and in the merge alike.

    Ordinary LoRA on a sparse model trains a dense delta; merging then either fills the zeros or, masked afterwards,
    yields a function that was never trained (methods §2.5: Wanda's ``lora_ft`` leaves it unmerged for that reason).
    Dropout acts on the delta's input only, as in LoRA (arXiv 2106.09685): ``W x + M * s(B A) dropout(x)``.
    """

    mask_OI: Tensor

    def __init__(self, base_layer: nn.Module, adapter_name: str, mask_OI: Tensor, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.register_buffer("mask_OI", mask_OI, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The masked delta of ``adapter``, ``(O, I)``: what a merge adds to the weight."""
        delta_OI: Tensor = super().get_delta_weight(adapter)
        return delta_OI.masked_fill(~self.mask_OI, 0.0)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """``(..., I) -> (..., O)``."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *arguments, **options)
        (adapter,) = self.active_adapters
        base = self.get_base_layer()
        factors = (self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.mask_OI, self.scaling[adapter])
        dropout = self.lora_dropout[adapter]
        if self.training and isinstance(dropout, nn.Dropout):
            return base(x) + _MaskedLinear.apply(dropout(x), None, None, *factors)
        # Without dropout both terms share their input: one product with the very weight that the merge will write.
        return _MaskedLinear.apply(x, base.weight, base.bias, *factors)


@contextmanager
def adapted(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    masks: Mapping[str, Tensor],
    rank: int,
    alpha: int,
    dropout: float,
) -> Iterator[Any]:
    """Lend ``model`` wrapped in LoRA adapters; afterwards it is the plain model again, whatever happened.

    Args:
        model: a transformers model; only ``linears`` get adapters, everything else is frozen.
        linears: the layers to adapt by their qualified name.
        masks: boolean ``(O, I)`` masks, True where kept, by parameter name (``<layer name>.weight``).

    Yields:
        The ``PeftModel``. Adapters that were not folded in (see ``merge``) are dropped at the end.
    """
    by_layer = {id(linear): masks[f"{name}.weight"] for name, linear in linears.items() if f"{name}.weight" in masks}

    def masked_layer(target: nn.Linear, adapter_name: str, **options: Any) -> MaskedLoraLinear | None:
        """What peft calls for each layer; None leaves the layer to peft's own ``lora.Linear``."""
        if id(target) not in by_layer:
            return None
        return MaskedLoraLinear(target, adapter_name, by_layer[id(target)].to(target.weight.device), **options)

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # One pattern that matches full names only; peft takes a list's entries as suffixes.
        target_modules="|".join(re.escape(name) for name in linears),
    )
    config._register_custom_module({nn.Linear: masked_layer})
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wrapped = get_peft_model(model, config)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def merged(wrapped: Any) -> dict[str, Tensor]:
    """Every adapted weight with its adapter folded in, ``(O, I)``, by the plain model's parameter names.

    Args:
        wrapped: the ``PeftModel`` of ``adapted``; it is not changed.
    """
    new = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if isinstance(layer, LoraLinear):
            weight = layer.get_base_layer().weight
            new_OI = whole(weight) + layer.get_delta_weight(layer.active_adapters[0])
            new[f"{name}.weight"] = placed_like(new_OI, weight)
    return new
