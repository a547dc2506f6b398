"""What a trace leaves behind: labels, the marks on them, and the parameters in the order of their use."""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.structure.axes import LabelArray, LabelTable

MARKS = {
    # what keeps a label from leaving
    "residual": "part of the hidden stream, or of anything else that enters or leaves the block",
    "reduced": "a norm, a mean or a softmax takes its statistics over it",
    "constant": "tied to something that is no parameter and has an entry for each index",
    "frozen": "a literal index in the model's code",
    "packed": "part of stacked weights, such as experts",
    # how it is used
    "produced": "free dimension of a weight in a product with activations (the labels of that weight only)",
    "consumed": "contracted dimension of a weight in a product with activations (the labels of that weight only)",
    "batched": "batch dimension of a product of two activations: attention heads",
    "contracted": "contracted dimension of a product of two activations: query and key features",
    "carried": "free dimension of a product of two activations: value features",
    "broadcast": "made by repeating something of size one: query heads that share a key",
}


@dataclass(frozen=True)
class Mark:
    kind: str
    labels: LabelArray
    reason: str


@dataclass(frozen=True)
class Axes:
    """The labels of a tracked tensor, and whether it was computed from parameters alone."""

    labels: list[LabelArray]
    is_weight: bool


@dataclass
class Trace:
    """What a block's forward left behind: labels, marks, and the parameters in the order they were used."""

    labels: LabelTable = field(default_factory=LabelTable)
    marks: list[Mark] = field(default_factory=list)
    parameters: dict[str, list[LabelArray]] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)
