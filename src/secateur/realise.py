"""Carrying out a plan: read each block, cut and mask it, write it, and check what was written."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import secateur
from secateur.allocation.nearest import nearest_even_cut
from secateur.checkpoint import uneven
from secateur.checkpoint.architecture import example_inputs
from secateur.checkpoint.manifest import write_manifest
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.shapes import OutputShape, output_shape
from secateur.checkpoint.verify import compare_logits, fresh_logits
from secateur.checkpoint.writer import ShardWriter, TensorSpec, copy_companions
from secateur.console import log, track
from secateur.errors import PlanError, StructureError
from secateur.files import human_bytes, require_space
from secateur.finite import all_finite
from secateur.plans import Plan
from secateur.proof import Verdict, prove_cut, proved_shape
from secateur.removal.decision import BlockDecision, within
from secateur.structure import (
    ModelCut,
    Structure,
    cut_shapes,
    cut_tensors,
    find_all_units,
    mask_tensors,
    masked_out,
)
from secateur.structure.cutting import Removal
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


@dataclass(frozen=True)
class _Piece:
    """Tensors that are written together, and what makes them."""

    names: tuple[str, ...]
    make: Callable[[], Mapping[str, torch.Tensor]]


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
        skeleton = checkpoint.skeleton
        if structure is None and any(entry.cuts for entry in plan.blocks):
            structure = find_all_units(skeleton.model, skeleton.blocks_name)
        self.structure = structure or Structure([], [])
        self.cut: ModelCut = plan.cut(self.structure, len(skeleton.blocks))
        self._check_masks()

    def _check_masks(self) -> None:
        for entry in self.plan.blocks:
            if not entry.masks:
                continue
            shapes = cut_shapes(self.checkpoint.skeleton.block_shapes(entry.block), self.cut.blocks[entry.block])
            matrices = self.checkpoint.skeleton.prunable(entry.block)
            for name, masked in entry.masks.items():
                if name not in matrices or matrices[name].shape(shapes) != tuple(masked.shape):
                    raise PlanError(
                        f"the plan's mask of '{name}' in block {entry.block} does not have the weight's shape"
                    )

    def check_numbers(self) -> None:
        """Refuse, before anything is written, a plan whose new weights are missing, damaged or of other shapes or dtypes.

        Raises:
            PlanError: it names the block.
        """
        for entry in self.plan.blocks:
            numbers = self.plan.numbers(entry.block)
            if not numbers:
                continue
            shapes = cut_shapes(self.checkpoint.skeleton.block_shapes(entry.block), self.cut.blocks[entry.block])
            matrices = self.checkpoint.skeleton.prunable(entry.block)
            for name, numbers_OI in numbers.items():
                matrix = matrices.get(name)  # else it is a bias
                wanted = matrix.shape(shapes) if matrix else shapes.get(name)
                if wanted != tuple(numbers_OI.shape):
                    raise PlanError(
                        f"the plan's new weights of '{name}' in block {entry.block} do not have the weight's shape"
                    )
                prefix = self.checkpoint.skeleton.block_prefix(entry.block)
                stored = self.checkpoint.tensors[prefix + (matrix.parameter if matrix else name)]
                if numbers_OI.dtype != stored.dtype:
                    raise PlanError(
                        f"the plan's new weights of '{name}' in block {entry.block} are {numbers_OI.dtype}, and the model's are "
                        f"{stored.dtype}"
                    )
                if not all_finite(numbers_OI):
                    raise PlanError(f"the plan's new weights of '{name}' in block {entry.block} are not finite")

    def decision(self, index: int) -> BlockDecision:
        """What leaves block ``index``; its masks are unpacked anew each time, so that only one block's are in memory."""
        masks, numbers = self.plan.masks(index), self.plan.numbers(index)
        matrices = self.checkpoint.skeleton.prunable(index) if masks or numbers else {}
        return BlockDecision(self.cut.blocks[index], masks, matrices, numbers)

    @cached_property
    def proof(self) -> Verdict | None:
        """The proof of this cut on a small instance of the config; None where nothing is cut.

        Raises:
            StructureError: cut and masked differ.
        """
        if not self.cut.takes_anything():
            return None
        assert self.structure is not None  # a cut names units of it
        verdict = prove_cut(self.checkpoint.skeleton, self.structure, self.cut)
        log.info("Proved on a small instance: cut and masked out agree to %.0e.", verdict.difference)
        return verdict

    @cached_property
    def output(self) -> OutputShape:
        """The config that says the new sizes."""
        structure = self.structure or Structure([], [])
        if self.proof is None:
            found = output_shape(self.checkpoint.skeleton, self.cut, structure)
        else:
            found = proved_shape(self.checkpoint.skeleton, structure, self.cut, self.proof)
        found.config.dtype = self.checkpoint.dtype
        found.config._name_or_path = ""
        return found

    def specs(self) -> list[TensorSpec]:
        """Every tensor to be written, in the model's order."""
        stored, blocks_name = self.checkpoint.tensors, self.checkpoint.skeleton.blocks_name
        dense = self.checkpoint.skeleton.shapes()
        after = self.cut.shapes(dense, blocks_name)
        renamed = ((name, self.cut.new_name(name, blocks_name)) for name in dense if name in stored)
        return [TensorSpec(new, after[new], stored[name].dtype) for name, new in renamed if new is not None]

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Before and after."""
        specs = self.specs()
        before = Sizes(self.checkpoint.parameters(), sum(tensor.bytes for tensor in self.checkpoint.stored()))
        after = Sizes(sum(torch.Size(s.shape).numel() for s in specs), sum(s.bytes for s in specs))
        return before, after

    def announce(self) -> None:
        """Say before anything is cut what will not load everywhere, and the nearest plan that does."""
        if not self.output.uneven:
            if self.output.form != "own" and self.proof is not None:
                log.warning(
                    "The family's own config refuses these sizes: the result is a %s, which computes the same.",
                    self.output.architecture,
                )
            return
        if self.output.form == "carved":
            log.warning(
                "CARVED: no config of this family says these sizes, so plain transformers loads the result only with "
                "trust_remote_code=True (secateur.load needs no such thing)."
            )
        elif any(units for removals in self.cut.blocks for _, units in removals):  # else they differ as they did before
            log.warning(
                "UNEVEN: blocks keep different sizes, so plain transformers loads the result only with trust_remote_code=True "
                "(secateur.load needs no such thing).%s",
                self._advice(),
            )

    def _advice(self) -> str:
        """The nearest plan that loads everywhere, where there is one."""
        skeleton = self.checkpoint.skeleton
        found = nearest_even_cut(self.structure, self.cut, skeleton.block_shapes)
        if found is None:
            return ""
        kinds, ratio, even = found
        try:
            loads = even.takes_anything() and not output_shape(skeleton, even, self.structure).uneven
        except StructureError:
            loads = False
        flags = f"--allocation uniform --unit {','.join(kinds)} --ratio {ratio:.3f}"
        return f" The nearest plan that loads everywhere: {flags} on all blocks." if loads else ""

    def write(self, folder: Path, work: Path | None = None) -> list[Path]:
        """Write weights, config and companions into ``folder``; returns the weight files.

        Args:
            work: where progress is noted, apart from ``folder``'s own content. A second call with the same, after the
                first was interrupted anywhere, goes on from the last finished block, and the bytes come out the same.
        """
        with self._writer(folder, work) as writer:
            self._write_pieces(writer)
            return self._complete(folder, writer)

    def write_share(self, folder: Path, work: Path, share: tuple[int, int]) -> None:
        """Write the part of the weights that falls to process ``share[0]`` of ``share[1]``; ``finish`` does the rest."""
        with self._writer(folder, work, rank=share[0]) as writer:
            self._write_pieces(writer, share)

    def finish(self, folder: Path, work: Path) -> list[Path]:
        """Once every share is written, by one process: index, config, companions and manifest; returns the weight files."""
        with self._writer(folder, work) as writer:
            return self._complete(folder, writer)

    def _writer(self, folder: Path, work: Path | None, rank: int = 0) -> ShardWriter:
        folder.mkdir(parents=True, exist_ok=True)
        identity = "" if work is None else f"{secateur.__version__} {self.plan.content_digest()}"
        return ShardWriter(folder, self.specs(), work=work, identity=identity, rank=rank)

    def _write_pieces(self, writer: ShardWriter, share: tuple[int, int] = (0, 1)) -> None:
        require_space(writer.folder, int(writer.remaining() * 1.02) + (1 << 20), "the pruned model")
        rank, size = share
        for piece in track(list(self._pieces())[rank::size], "Writing"):
            if not writer.holds(piece.names):
                writer.write(piece.make())

    def _complete(self, folder: Path, writer: ShardWriter) -> list[Path]:
        files = writer.close()
        self.output.config.save_pretrained(folder)
        if self.output.uneven:
            shutil.copyfile(uneven.__file__, folder / MODELLING_FILE)
        copy_companions(self.checkpoint.folder, folder, with_code=self._remote())
        write_manifest(folder, files)
        return files

    def _pieces(self) -> Iterator[_Piece]:
        """What is written at once, in the model's order: a block, or one tensor outside of them."""
        skeleton, done = self.checkpoint.skeleton, set()
        owner = {skeleton.block_prefix(i) + name: i for i in self.cut.kept() for name in skeleton.block_names(i)}
        inside = skeleton.blocks_name + "."
        for name in skeleton.shapes():
            index = owner.get(name)
            if index is not None and index not in done:
                done.add(index)
                prefix = skeleton.block_prefix(self.cut.kept().index(index))
                names = tuple(prefix + own for own in skeleton.block_names(index))
                yield _Piece(names, functools.partial(self._block_cut, index, prefix))
            elif not name.startswith(inside) and name in self.checkpoint.tensors:
                yield _Piece((name,), functools.partial(self._outside_cut, name))

    def _block_cut(self, index: int, prefix: str) -> dict[str, torch.Tensor]:
        """One block without what leaves it, under its new names."""
        result = self.decision(index).carry_out(self.checkpoint.block_tensors(index), in_place=True)
        return {prefix + name: tensor for name, tensor in result.items()}

    def _outside_cut(self, name: str) -> dict[str, torch.Tensor]:
        """One tensor outside the blocks without the units that leave everywhere."""
        return cut_tensors(self.checkpoint.read([name]), self._touching([name]))

    def _touching(self, names: Collection[str]) -> list[Removal]:
        """What leaves outside the blocks, as far as it is in these tensors."""
        parts = [(within(group, names), units) for group, units in self.cut.outside]
        return [removal for removal in parts if removal[0].members]

    def verify(self, folder: Path) -> float:
        """Load ``folder`` in a fresh process; its logits must be those of the dense model with the same units masked.

        Returns:
            the largest difference, as a share of the largest logit.
        """
        log.info("Checking the written model in a fresh process ...")
        inputs, skeleton = check_inputs(self.checkpoint), self.checkpoint.skeleton
        with masked_out(skeleton.model, skeleton.blocks_name, self.cut):
            expected = streamed_logits(self.checkpoint, inputs, self._masked_dense, self._masked_outside)
        return compare_logits(expected, fresh_logits(folder, inputs, remote_code=self.output.uneven or self._remote()))

    def _remote(self) -> bool:
        return self.plan.recipe.trust_remote_code

    def _masked_dense(self, index: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.decision(index).in_dense_shapes(tensors, in_place=True)

    def _masked_outside(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return mask_tensors(tensors, self._touching(tensors.keys()))


def check_inputs(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Fixed pseudo-random inputs for comparing logits: ``CHECK_TOKENS`` tokens, or an image."""
    return example_inputs(checkpoint.skeleton.model, batch=1, tokens=CHECK_TOKENS)


def describe_sizes(before: Sizes, after: Sizes) -> str:
    """``134.5M -> 108.0M parameters (-19.7 %)`` and bytes, in one line."""
    share = 100 * (after.parameters / before.parameters - 1)
    return (
        f"{before.parameters:,} -> {after.parameters:,} parameters ({share:+.1f} %), "
        f"{human_bytes(before.bytes)} -> {human_bytes(after.bytes)} on disk"
    )
