"""What a trace leaves behind: labels, the marks on them, and the parameters in the order of their use."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from secateur.structure.axes import LabelArray, LabelTable

MARKS = {
    # what keeps a label from leaving
    "residual": "part of the hidden stream, or of anything else that enters or leaves the block",
    "reduced": "a norm or a mean takes its statistics over it (a module that is a norm can do so over the survivors)",
    "normalised": "a softmax runs over it",
    "constant": "tied to something that is no parameter and has an entry for each index",
    "frozen": "a literal index in the model's code",
    "packed": "part of stacked weights that all run at once",
    # how it is used
    "produced": "free dimension of a weight in a product with activations (the labels of that weight only)",
    "consumed": "contracted dimension of a weight in a product with activations (the labels of that weight only)",
    "batched": "batch dimension of a product of two activations: attention heads",
    "contracted": "contracted dimension of a product of two activations: query and key features",
    "carried": "free dimension of a product of two activations: value features",
    "chosen": "a top-k chooses among them: experts",
    "picked": "what was chosen picks these entries of a parameter (the labels of that parameter only)",
    "broadcast": "made by repeating something of size one: query heads that share a key",
}


@dataclass(frozen=True)
class Mark:
    kind: str
    labels: LabelArray
    reason: str
    module: str = ""  # where it happened
    amount: int = 0  # chosen: how many of them


@dataclass(frozen=True)
class Axes:
    """The labels of a tracked tensor.

    Attributes:
        labels: for each dimension.
        is_weight: whether it was computed from parameters alone.
        values: of a tensor of indices, the labels they choose among.
    """

    labels: list[LabelArray]
    is_weight: bool
    values: LabelArray | None = None


@dataclass
class Trace:
    """What a forward left behind.

    Attributes:
        parameters: labels of parameters and stored buffers, by name.
        used: their names in the order of their use.
        aliases: further names of parameters that are tied to one in ``parameters``.
        arguments: labels of constants that entered (block arguments, computed buffers), where they are followed.
        norms: modules without parts whose output has the labels of their input -> its last dimension.
        hidden: the residual stream's labels.
    """

    labels: LabelTable = field(default_factory=LabelTable)
    marks: list[Mark] = field(default_factory=list)
    parameters: dict[str, list[LabelArray]] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, list[LabelArray]] = field(default_factory=dict)
    norms: dict[str, LabelArray] = field(default_factory=dict)
    hidden: LabelArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
