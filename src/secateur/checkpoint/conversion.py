"""From the names a folder stores to the model's own.

Some families are stored in another form than they run in: experts apart that run fused, modules under older names. What
that takes is transformers' own list of renamings and operations for the model; here they are applied to one tensor of
the model at a time, so that no more than its sources is in memory.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies, and what it is."""

    file: Path
    stored_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    """Of its first byte in the file."""

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Origin:
    """What one tensor of the model, or several that are stored as one, are made of.

    Attributes:
        name: the model's name for it, or for the first of them.
        converter: the operations of transformers that make it; None where the stored tensor is taken as it is.
        sources: the stored tensors, in order.
        patterns: for each source, which of the converter's patterns it came by.
    """

    name: str
    converter: Any = None
    sources: list[StoredTensor] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)

    def make(self, model: Any, read: Callable[[StoredTensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors by the model's names; ``read`` brings in one source."""
        if self.converter is None:
            return {self.name: read(self.sources[0])}
        converter = copy.deepcopy(self.converter)  # it collects what it is given
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.name, source.stored_name, pattern, functools.partial(read, source))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def describe(self) -> str:
        """The stored names and a file, for a message."""
        first, more = self.sources[0], len(self.sources) - 1
        return f"'{first.stored_name}'{f' with {more} more' if more else ''} in {first.file}"


def find_origins(model: Any, stored: Mapping[str, StoredTensor]) -> list[Origin]:
    """What the model's tensors are made of; stored tensors that have no place in the model are in none of them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    origins: dict[str, Origin] = {}
    # The order is transformers' own: experts are stacked in the order in which they come.
    for stored_name in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(stored_name, renamings, converters, prefix, own)
        if name not in own:  # stored under the model's own name, to which the transforms do not apply a second time
            name, pattern = rename_source_key(stored_name, [], [], prefix, own)
        if name not in own or (pattern is None and name in origins):
            continue
        origin = origins.setdefault(name, Origin(name, by_pattern.get(pattern)))
        origin.sources.append(stored[stored_name])
        origin.patterns.append(pattern or stored_name)
    return list(origins.values())


def usual_name(model: Any, name: str) -> str:
    """The name (of several, a pattern) under which folders of this family store the model's tensor ``name``."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

    transforms = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    reverse = [transform.reverse_transform() for transform in transforms[::-1]]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    return rename_source_key(name, renamings, converters, reverse=True)[0]
