"""Before any work: how much memory, disk and time it will take on this machine, and whether it can be done at all.

One block is probed as the sweep will run it: read, run on one micro-batch, backward where gradients are wanted, one of its
matrices scored. What a block takes is measured there; what is only many of it (statistics, files) is counted.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.checkpoint.architecture import named_inputs
from secateur.checkpoint.outside import PIECE
from secateur.checkpoint.placement import Placement
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.console import log
from secateur.criteria import BlockCriterion
from secateur.errors import TooLargeError
from secateur.files import human_bytes, human_seconds
from secateur.memory import memory_available, memory_now, peak_of
from secateur.recipe import Recipe
from secateur.removal.masks import row_mask
from secateur.scoring import BlockScorer
from secateur.statistics import GradientStatistic, InputStatistic, gradient_kinds
from secateur.sweep.backward import LOGITS, bytes_kept
from secateur.sweep.entrance import BlockCalls, enter
from secateur.sweep.taps import InputTaps, Kept, run_with_graph
from secateur.sweep.walk import fresh, of_kind

SHARE_OF_FREE = 0.85
"""Of the memory that is free, what a run takes where nobody says how much."""

SCORING = 5
"""A score and what its making, choosing and masking hold beside it, in sizes of the largest matrix in float32."""

PRODUCT = 512
"""Rows and columns of the matrices whose product says how long an operation takes."""

SLACK = 1.1


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        memory: bytes at peak that cannot do without: the process, one block, its statistics and scores.
        limit: bytes that the run may take.
        kept: bytes at most of what may be kept between blocks; it goes to disk where it does not fit.
        scratch: bytes on the disk of the run folder while it runs.
        cache: bytes on the disk of the cache.
        output: bytes of the result.
        seconds: of scoring and choosing, and of writing.
        micro_batch: windows that run at once.
    """

    memory: int
    limit: int
    kept: int
    scratch: int
    cache: int
    output: int
    seconds: float
    micro_batch: int

    @property
    def spare(self) -> int:
        """Bytes for what may be kept between blocks."""
        return max(0, self.limit - self.memory)

    def in_words(self) -> str:
        peak = self.memory + min(self.kept, self.spare)
        disk = self.scratch + self.cache + self.output
        return (
            f"about {human_bytes(peak)} of memory at peak (at least {human_bytes(self.memory)}, allowed "
            f"{human_bytes(self.limit)}), {human_bytes(disk)} of disk ({human_bytes(self.output)} of it the result), "
            f"{human_seconds(self.seconds)}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Probe:
    """What one block took: seconds to read it, to run a micro-batch forward, and forward and back; bytes beside its weights.

    ``scored`` is in seconds a weight, ``operation`` in seconds of one in a matrix product; ``graph`` in bytes that a
    micro-batch's graph keeps.
    """

    read: float = 0.0
    forward: float = 0.0
    both: float = 0.0
    scored: float = 0.0
    operation: float = 0.0
    graph: int = 0
    peak: int = 0


def limit_of(recipe: Recipe, workers: int = 1) -> int:
    """Bytes that each worker of a run may take: what was asked for, or its part of most of what is free."""
    if recipe.memory_bytes is not None:
        return recipe.memory_bytes
    free = memory_available()
    return memory_now() + int(free * SHARE_OF_FREE) // workers if free is not None else 1 << 62


class Preflight:
    """Estimates one sweep of a recipe.

    Args:
        windows: calibration windows of this worker, and tokens in each.
        writes: whether the pruned model is written too.
        keeps_scores: bytes of scores that go to the cache.
        limit: bytes that may be taken.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        placement: Placement,
        micro_batch: int,
        windows: tuple[int, int],
        keeps_scores: int,
        writes: bool,
        limit: int,
    ) -> None:
        self.limit = limit
        self.checkpoint, self.recipe, self.placement = checkpoint, recipe, placement
        self.windows, self.keeps_scores, self.writes = windows, keeps_scores, writes
        self.needs, self.removal, self.policy = recipe.needs(), recipe.parsed_removal(), recipe.parsed_policy()
        self.reconstruction = recipe.parsed_reconstruction()
        self.micro_batch = micro_batch
        self.blocks = recipe.block_range(len(checkpoint.skeleton.blocks))

    def estimate(self) -> Estimate:
        """Probe a block and count."""
        probe = self._probed()
        boundaries, spilled_gradients = self._between_blocks()
        limit = self.limit
        memory = int(SLACK * max(self._scoring(), self._running(probe), self._fitting(probe))) + memory_now()
        gradients = 2 * self._weights() if spilled_gradients else 0
        return Estimate(
            memory=memory,
            limit=limit,
            kept=boundaries + self._graphs(probe),
            scratch=max(0, boundaries - max(0, limit - memory)) + self._boundary() + self._numbers(),
            cache=self.keeps_scores + gradients * len(gradient_kinds(self.needs)),
            output=self._bytes() if self.writes else 0,
            seconds=self._seconds(probe),
            micro_batch=self.micro_batch,
        )

    # -- counted

    def _matrices(self) -> list[tuple[int, int]]:
        """The shapes of one block's matrices, the largest block's."""
        skeleton = self.checkpoint.skeleton
        index = max(self.blocks, key=lambda i: sum(map(math.prod, skeleton.block_shapes(i).values())))
        shapes = skeleton.block_shapes(index)
        return [matrix.shape(shapes) for matrix in skeleton.prunable(index).values()]

    def _weights(self) -> int:
        """Single weights that have a score, in all blocks."""
        return len(self.blocks) * sum(map(math.prod, self._matrices()))

    def _block(self) -> int:
        """Bytes of one block's weights as they are computed with, and mapped as they are stored."""
        skeleton = self.checkpoint.skeleton
        return max(
            sum(math.prod(shape) for shape in skeleton.block_shapes(index).values())
            for index in range(len(skeleton.blocks))
        ) * (self.placement.dtype.itemsize)

    def _statistics(self) -> int:
        """Bytes of one block's statistics."""
        found = 0
        for kind in self.needs:
            for outputs, inputs in self._matrices():
                if issubclass(kind, GradientStatistic):
                    found += 4 * outputs * inputs
                else:
                    found += 4 * (inputs * inputs if "second_moment" in kind.name else inputs)
        return found

    def _scoring(self) -> int:
        """Bytes while a block is scored."""
        largest = max(map(math.prod, self._matrices()), default=0)
        removing = max((self.removal.scratch_bytes(*shape) for shape in self._matrices()), default=0)
        numbers = self._bytes_of_block() if self._updates_weights else 0
        return self._block() + self._statistics() + max(SCORING * 4 * largest, removing) + numbers

    def _fitting(self, probe: _Probe) -> int:
        """Bytes while a block is fitted: beside it, in float32, the weights, their gradients or one more copy to judge, two
        moments, what it began and ended with and the best so far; and a graph."""
        if self.reconstruction is None:
            return 0
        return 2 * self._block() + 7 * 4 * sum(map(math.prod, self._matrices())) + probe.graph + probe.peak

    def _running(self, probe: _Probe) -> int:
        """Bytes while a block runs, or while the head does."""
        text = self.checkpoint.config.get_text_config()
        tables = min(PIECE, 4 * text.vocab_size * text.hidden_size)
        logits = min(LOGITS, 4 * text.vocab_size * self.windows[1])
        ends = tables + 4 * logits if self.needs else 0
        return max(self._block() + probe.peak, ends)

    def _boundary(self) -> int:
        """Bytes of the hidden states of all windows."""
        if not self.recipe.reads_text:
            return 0
        count, length = self.windows
        return count * length * self.checkpoint.config.get_text_config().hidden_size * self.placement.dtype.itemsize

    def _between_blocks(self) -> tuple[int, bool]:
        """Bytes that cross between blocks at most, and whether gradients wait on disk for the walk that prunes."""
        exact = bool(gradient_kinds(self.needs)) and self.recipe.gradient == "exact"
        waits = (
            self.recipe.propagate == "pruned" and bool(gradient_kinds(self.needs)) and self.recipe.gradient != "block"
        )
        walking = 4 if self.reconstruction else 2  # the dense model's walk along
        boundaries = len(self.checkpoint.skeleton.blocks) - self.blocks.start + 2 if exact else walking
        return max(boundaries * self._boundary(), int(self._variants() * self._boundary())), waits

    def _variants(self) -> float:
        """As many boundaries of all windows an allocation keeps that measures the loss with each block masked."""
        if self.policy is None or not self.policy.measured:
            return 0
        return (len(self.blocks) + 2) * self._measured_share()

    def _measured_share(self) -> float:
        """The part of the windows that such an allocation measures on."""
        assert self.policy is not None
        return min(1.0, self.policy.options.windows / self.windows[0])

    def _operations(self) -> float:
        """Of the removal, in all blocks, where single weights leave."""
        if not self.recipe.masks_weights:
            return 0.0
        return len(self.blocks) * sum(self.removal.operations(*shape) for shape in self._matrices())

    def _seconds_of_policy(self, probe: _Probe) -> float:
        """Of the walk that an allocation takes beforehand; a spectrum takes about what reading a block does."""
        count, forward = len(self.blocks), -(-self.windows[0] // self.micro_batch) * probe.forward
        if self.policy is None:
            return 0.0
        if not self.policy.measured:
            return count * (probe.read + (forward if self.policy.needs() else 0.0))
        return count * (probe.read + self._measured_share() * forward * (len(self.checkpoint.skeleton.blocks) + 1) / 2)

    def _graphs(self, probe: _Probe) -> int:
        """Bytes that an exact backward walk keeps at most, so as not to run blocks again."""
        if not gradient_kinds(self.needs) or self.recipe.gradient != "exact":
            return 0
        batches = -(-self.windows[0] // self.micro_batch)
        return (len(self.checkpoint.skeleton.blocks) - self.blocks.start) * (self._block() + batches * probe.graph)

    def _numbers(self) -> int:
        """Bytes of new numbers, which wait for the plan to be carried out."""
        return len(self.blocks) * self._bytes_of_block() if self._updates_weights else 0

    @property
    def _updates_weights(self) -> bool:
        return self.recipe.updates and (self.reconstruction is not None or not self.removal.writes_biases)

    def _bytes_of_block(self) -> int:
        """One block's matrices as they are stored."""
        return sum(map(math.prod, self._matrices())) * self.checkpoint.dtype.itemsize

    def _bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.checkpoint.tensors.values())

    def _seconds(self, probe: _Probe) -> float:
        """Passes over the blocks, each with the blocks it needs; scores and masks are a small part of it."""
        count, batches = len(self.checkpoint.skeleton.blocks), -(-self.windows[0] // self.micro_batch)
        forward, both = batches * probe.forward, batches * probe.both
        gradients = bool(gradient_kinds(self.needs))
        seconds = 0.0
        if gradients and self.recipe.gradient == "exact":
            seconds += count * (forward + both + 2 * probe.read)
        elif gradients and self.recipe.gradient == "forward":
            seconds += count * (2 * (self.recipe.queries or 0) * forward + probe.read)
        own = both if gradients and self.recipe.gradient == "block" else forward
        from_inputs = any(issubclass(kind, InputStatistic) for kind in self.needs)
        if self.reconstruction is not None:
            seconds += count * ((3 + self.reconstruction.forwards) * forward + probe.read)
        elif self.recipe.propagate == "pruned" and from_inputs:
            seconds += count * (own + forward + probe.read)
        elif not gradients or self.recipe.gradient != "exact":
            seconds += count * (own + probe.read)
        seconds += (
            self._weights() * probe.scored + self._seconds_of_policy(probe) + self._operations() * probe.operation
        )
        written = 3 * count * probe.read if self.writes else 0.0  # read, written, read again to be checked
        return seconds + written

    # -- measured

    def _probed(self) -> _Probe:
        """Run a block on one micro-batch; on a GPU that is too small for it, on half of it, and so on.

        Raises:
            TooLargeError: the GPU cannot hold one window.
        """
        while True:
            try:
                return self._probe(self.micro_batch)
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                if self.micro_batch == 1:
                    raise TooLargeError(
                        "the GPU's memory does not hold one block with one window; give a smaller --window-length, or "
                        "--device cpu"
                    ) from error
                self.micro_batch //= 2
                log.warning("The GPU's memory is too small for that; the micro-batch is now %d.", self.micro_batch)

    def _probe(self, micro_batch: int) -> _Probe:
        entering: list[torch.Tensor] = []
        calls = None
        if self.recipe.reads_text:
            ids_BT = torch.zeros(min(micro_batch, self.windows[0]), self.windows[1], dtype=torch.int64)
            inputs = [named_inputs(ids_BT)]
            calls = enter(self.checkpoint, inputs, lambda _, x: entering.append(x), placement=self.placement)
        started = time.perf_counter()
        with resident_block(self.checkpoint, 0, self.placement) as block:
            probe = _Probe(read=time.perf_counter() - started)
            run = _Run(self.checkpoint, block, calls, entering, self.recipe)
            probe.peak = peak_of(lambda: self._time(block, run, probe))
        return probe

    def _time(self, block: nn.Module, run: _Run, probe: _Probe) -> None:
        if self.recipe.reads_text:
            probe.forward = self._seconds_of(run.forward)
        if (
            gradient_kinds(self.needs) or self.recipe.reconstruct
        ):  # also where they are estimated: their statistics are of the same sizes
            probe.graph = bytes_kept(block, run.with_graph)
            probe.both = self._seconds_of(run.forward_and_back)
        weights = run.smallest() if not isinstance(self.recipe.parsed_criterion(), BlockCriterion) else 0
        if weights:
            probe.scored = self._seconds_of(run.score) / weights
        if self._operations():
            probe.operation = self._seconds_of(run.product) / (2 * PRODUCT**3)

    def _seconds_of(self, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        if self.placement.is_gpu:
            torch.cuda.synchronize(self.placement.device)
        return time.perf_counter() - started


class _Run:
    """The first block on one micro-batch, run and scored as the sweep does it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        block: nn.Module,
        calls: BlockCalls | None,
        entering: list[torch.Tensor],
        recipe: Recipe,
    ) -> None:
        self._checkpoint, self._block, self._calls, self._recipe = checkpoint, block, calls, recipe
        self._x = entering
        self._matrices = checkpoint.skeleton.prunable(0)
        self._statistics = fresh(self._matrices, recipe.needs())

    @torch.no_grad()
    def forward(self) -> None:
        assert self._calls is not None
        taps = InputTaps(self._matrices, of_kind(self._statistics, InputStatistic))
        with taps.watching(self._block, len(self._x[0])):
            self._calls.run(self._block, 0, 0, self._x[0])

    def with_graph(self) -> Kept:
        assert self._calls is not None
        return run_with_graph(self._block, partial(self._calls.run, self._block, 0, 0), self._x[0], self._matrices)

    def forward_and_back(self) -> None:
        kept = self.with_graph()
        kept.out_BTD.backward(torch.ones_like(kept.out_BTD))
        kept.taps.fold(of_kind(self._statistics, GradientStatistic))

    def smallest(self) -> int:
        """How many weights the smallest matrix has; 0 where the block has none."""
        return min((p.numel() for p in self._sizes().values()), default=0)

    def score(self) -> None:
        """Score the smallest matrix, and choose in it."""
        name = min(self._sizes(), key=lambda name: self._sizes()[name].numel())
        scorer = BlockScorer(self._checkpoint.skeleton, 0, self._block, self._statistics, self._recipe)
        for _, score_OI in scorer.of_weights([name]):
            if self._recipe.masks_weights:
                row_mask(score_OI, 0.5)

    def product(self) -> None:
        """Multiply two square matrices where the block lies."""
        square_II = torch.ones(PRODUCT, PRODUCT, device=next(self._block.parameters()).device)
        square_II @ square_II

    def _sizes(self) -> dict[str, torch.Tensor]:
        parameters = dict(self._block.named_parameters())
        return {name: matrix.of(parameters) for name, matrix in self._matrices.items()}


def refuse_what_cannot_fit(estimate: Estimate, recipe: Recipe, scratch: Path, cache: Path, out: Path | None) -> None:
    """Refuse a run that this machine cannot carry out, and say which option would help.

    Raises:
        TooLargeError: too little memory or disk.
    """
    if estimate.memory > estimate.limit:
        asked = recipe.memory_bytes is not None
        what = f"--memory {recipe.memory}" if asked else f"the {human_bytes(estimate.limit)} that are free"
        smaller = (
            "a smaller --micro-batch or --window-length" if estimate.micro_batch > 1 else "a smaller --window-length"
        )
        more = f"--memory {math.ceil(estimate.memory / (1 << 28)) / 4:g}GiB" if asked else "a machine with more memory"
        raise TooLargeError(
            f"this run needs about {human_bytes(estimate.memory)} of memory at the least, more than {what}; give {more}, "
            f"{smaller}, or a --criterion that needs less (wanda, magnitude)"
        )
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, size in ((scratch, estimate.scratch), (cache, estimate.cache), (out, estimate.output)):
        if folder is not None:
            present = next(place for place in (folder, *folder.parents) if place.exists())
            device = present.stat().st_dev
            wanted[device] = (present, wanted.get(device, (present, 0))[1] + size)
    for folder, size in wanted.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise TooLargeError(
                f"this run needs about {human_bytes(size)} on the disk of {folder}, which has {human_bytes(free)} free "
                f"({human_bytes(estimate.scratch)} between blocks, {human_bytes(estimate.cache)} of scores and gradients, "
                f"{human_bytes(estimate.output)} for the result); free some, give more --memory or fewer --windows, or put "
                "$SECATEUR_CACHE and --out on another disk"
            )
