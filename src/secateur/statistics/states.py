"""Statistics of one block as flat named tensors, to store and to go on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from secateur.statistics.base import Statistic

BlockStatistics = dict[str, dict[type[Statistic], Statistic]]
"""For each matrix of a block, and under ``BLOCK`` for the block itself, the statistics gathered on it."""

BLOCK = ""
"""The block itself among its parts: the name that it has among its own modules, and no matrix has."""


def as_states(statistics: BlockStatistics) -> dict[str, torch.Tensor]:
    """All statistics of one block as flat named tensors."""
    return {
        f"{name}|{kind.name}|{part}": tensor.cpu()
        for name, kinds in statistics.items()
        for kind, statistic in kinds.items()
        for part, tensor in statistic.state().items()
    }


def add_states(
    statistics: BlockStatistics, states: Mapping[str, torch.Tensor], kinds: Iterable[type[Statistic]]
) -> None:
    """Put stored statistics beside those just gathered."""
    for name, gathered in statistics.items():
        for kind in kinds:
            prefix = f"{name}|{kind.name}|"
            state = {key.removeprefix(prefix): tensor for key, tensor in states.items() if key.startswith(prefix)}
            gathered[kind] = kind.from_state(state)
