"""Carrying out a plan: read each block, cut and mask it, write it, and check what was written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from secateur.checkpoint import uneven
from secateur.checkpoint.manifest import write_manifest
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.shapes import OutputShape, output_shape
from secateur.checkpoint.skeleton import is_uneven
from secateur.checkpoint.verify import compare_logits, fresh_logits
from secateur.checkpoint.writer import ShardWriter, TensorSpec, copy_companions
from secateur.console import log, track
from secateur.errors import PlanError
from secateur.files import human_bytes, require_space
from secateur.planning import find_structure
from secateur.plans import Plan
from secateur.removal.decision import BlockDecision
from secateur.structure import Structure, cut_shapes, parameters_per_unit
from secateur.sweep.logits import streamed_logits

CHECK_TOKENS = 48
MODELLING_FILE = "modeling_secateur.py"


@dataclass(frozen=True)
class Sizes:
    """What a model weighs."""

    parameters: int
    bytes: int

    def to_json(self) -> dict[str, int]:
        return {"parameters": self.parameters, "bytes": self.bytes}


class Realisation:
    """A plan together with the checkpoint it is for.

    Raises:
        PlanError: the plan was made for another model, or does not fit it.
        StructureError: no config can say the sizes it leaves.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, structure: Structure | None = None) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        if plan.model.sha256 != checkpoint.content_hash:
            raise PlanError(
                f"the plan was made for another model ({plan.model.spec}, {plan.model.sha256[:12]}), not for "
                f"{checkpoint.source.spec} ({checkpoint.content_hash[:12]}); give the model it names, or plan again"
            )
        if structure is None and any(entry.cuts for entry in plan.blocks):
            structure = find_structure(checkpoint)
        self.structure = structure
        groups = structure.units if structure else []
        count = len(checkpoint.skeleton.blocks)
        if any(entry.block not in range(count) for entry in plan.blocks):
            raise PlanError(f"the plan names blocks that the model, which has {count}, does not have")
        self._groups = [[group for group in groups if group.block == index] for index in range(count)]
        self._removals = [plan.removals(index, self._groups[index]) for index in range(count)]
        self._check_masks()

    def _check_masks(self) -> None:
        for entry in self.plan.blocks:
            shapes = self.shapes_after[entry.block]
            for name, masked in entry.masks.items():
                if shapes.get(name) != tuple(masked.shape):
                    raise PlanError(
                        f"the plan's mask of '{name}' in block {entry.block} does not have the weight's shape"
                    )

    def decision(self, index: int) -> BlockDecision:
        """What leaves block ``index``; its masks are unpacked anew each time, so that only one block's are in memory."""
        return BlockDecision(self._removals[index], self.plan.masks(index))

    @cached_property
    def shapes_before(self) -> list[dict[str, tuple[int, ...]]]:
        blocks = self.checkpoint.skeleton.blocks
        return [{name: tuple(tensor.shape) for name, tensor in block.state_dict().items()} for block in blocks]

    @cached_property
    def shapes_after(self) -> list[dict[str, tuple[int, ...]]]:
        return [
            cut_shapes(shapes, removals) for shapes, removals in zip(self.shapes_before, self._removals, strict=True)
        ]

    @cached_property
    def output(self) -> OutputShape:
        """The config that says the new sizes."""
        widths = [
            min(member.index_UC.shape[1] for member in group.members)
            for removals in self._removals
            for group, removed in removals
            if removed and group.kind in ("head", "query")
        ]
        model = self.checkpoint.skeleton.model
        # An uneven model's class is made on the fly; its config names the family's.
        own = is_uneven(self.checkpoint.config)
        architecture = self.checkpoint.config.architectures[0] if own else type(model).__name__
        found = output_shape(
            self.checkpoint.config, architecture, self.shapes_before, self.shapes_after, min(widths, default=None)
        )
        found.config.dtype = self.checkpoint.dtype
        found.config._name_or_path = ""
        return found

    def specs(self) -> list[TensorSpec]:
        """Every tensor to be written, in the model's order."""
        skeleton = self.checkpoint.skeleton
        after = {
            skeleton.block_prefix(index) + name: shape
            for index, shapes in enumerate(self.shapes_after)
            for name, shape in shapes.items()
        }
        stored = self.checkpoint.tensors
        order = [name for name in skeleton.shapes() if name in stored]
        return [TensorSpec(name, after.get(name, stored[name].shape), stored[name].dtype) for name in order]

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Before and after."""
        stored, specs = self.checkpoint.tensors.values(), self.specs()
        before = Sizes(self.checkpoint.parameters(), sum(tensor.bytes for tensor in stored))
        after = Sizes(sum(torch.Size(s.shape).numel() for s in specs), sum(s.bytes for s in specs))
        return before, after

    def announce(self) -> None:
        """Say before anything is cut what will not load everywhere, and the nearest plan that does."""
        if not self.output.uneven or self.structure is None:  # without a cut, blocks differ only as they did before
            return
        log.warning(
            "UNEVEN: blocks keep different sizes, so plain transformers loads the result only with trust_remote_code=True "
            "(secateur.load needs no such thing). The nearest plan that loads everywhere: --allocation uniform --unit %s "
            "--ratio %.3f on all blocks.",
            ",".join(self.plan.recipe.unit),
            self._nearest_uniform_ratio(self.structure),
        )

    def _nearest_uniform_ratio(self, structure: Structure) -> float:
        """The share of all blocks' parameters in these units that this plan takes, or what takes one unit at least."""
        kinds = [kind for kind, (gone, _) in self.plan.removed_by_kind().items() if gone]
        groups = [group for group in structure.units if group.kind in kinds]
        each = [parameters_per_unit(group, self.shapes_before[group.block]) for group in groups]
        there = sum(group.count * size for group, size in zip(groups, each, strict=True))
        gone = sum(
            len(units) * parameters_per_unit(group, self.shapes_before[group.block])
            for removals in self._removals
            for group, units in removals
        )
        smallest = min(1 / (group.count // group.families) for group in groups)
        return math.ceil(1000 * max(gone / there, smallest)) / 1000

    def write(self, folder: Path) -> list[Path]:
        """Write weights, config and companions into ``folder``; returns the weight files."""
        _, after = self.sizes()
        require_space(folder, int(after.bytes * 1.02) + (1 << 20), "the pruned model")
        specs = self.specs()
        writer = ShardWriter(folder, specs)
        try:
            for tensors in track(self._tensors_in_order([s.name for s in specs]), "Writing", len(self._removals) + 2):
                writer.write(tensors)
            files = writer.close()
        finally:
            writer.abandon()
        self.output.config.save_pretrained(folder)
        if self.output.uneven:
            shutil.copyfile(uneven.__file__, folder / MODELLING_FILE)
        copy_companions(self.checkpoint.folder, folder, with_code=self._remote())
        write_manifest(folder, files)
        return files

    def _tensors_in_order(self, names: list[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Tensors in the order of ``names``, a block at a time: an order of the model keeps each block together."""
        skeleton = self.checkpoint.skeleton
        owner = {
            skeleton.block_prefix(index) + name: index
            for index, shapes in enumerate(self.shapes_before)
            for name in shapes
        }
        done: set[int] = set()
        for name in names:
            index = owner.get(name)
            if index is None:
                yield self.checkpoint.read([name])
            elif index not in done:
                done.add(index)
                result = self.decision(index).carry_out(self.checkpoint.block_tensors(index))
                yield {skeleton.block_prefix(index) + key: tensor for key, tensor in result.items()}

    def verify(self, folder: Path) -> float:
        """Load ``folder`` in a fresh process; its logits must be those of the dense model with the same units masked.

        Returns:
            the largest difference, as a share of the largest logit.
        """
        log.info("Checking the written model in a fresh process ...")
        ids_BT = check_tokens(self.checkpoint)
        expected = streamed_logits(self.checkpoint, ids_BT, self._masked_dense)
        return compare_logits(expected, fresh_logits(folder, ids_BT, remote_code=self.output.uneven or self._remote()))

    def _remote(self) -> bool:
        return self.plan.recipe.trust_remote_code

    def _masked_dense(self, index: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.decision(index).in_dense_shapes(tensors)


def check_tokens(checkpoint: Checkpoint) -> torch.Tensor:
    """A fixed pseudo-random window ``(1, CHECK_TOKENS)`` for comparing logits."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = checkpoint.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, CHECK_TOKENS), generator=generator)


def describe_sizes(before: Sizes, after: Sizes) -> str:
    """``134.5M -> 108.0M parameters (-19.7 %)`` and bytes, in one line."""
    share = 100 * (after.parameters / before.parameters - 1)
    return (
        f"{before.parameters:,} -> {after.parameters:,} parameters ({share:+.1f} %), "
        f"{human_bytes(before.bytes)} -> {human_bytes(after.bytes)} on disk"
    )
