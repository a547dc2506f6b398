"""Many pruned variants of one model measured in one walk over its blocks, without writing any of them.

Each block is read once. The dense model and every variant run through it in turn, each on what its own blocks before have
given, so that at most a few copies of one block are in memory. A variant keeps its dense sizes: what leaves it is zeroed
where it is read, norms look at the survivors, a block that leaves is passed by.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from secateur.calibration import TokenWindows
from secateur.checkpoint.architecture import ModelInputs, named_inputs
from secateur.checkpoint.placement import Placement
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import buffers_on
from secateur.checkpoint.skeleton import build_skeleton
from secateur.console import progress
from secateur.evaluation.divergence import Tally, log_probabilities, mean_and_error
from secateur.evaluation.perplexity import Perplexity, not_finite, perplexity_of
from secateur.realise import Realisation
from secateur.removal.decision import BlockDecision, within
from secateur.structure import cut_tensors, mask_tensors
from secateur.structure.cutting import Removal
from secateur.structure.masking import masked_out_of
from secateur.sweep.boundary import BoundaryStore
from secateur.sweep.entrance import BlockCalls, enter, head
from secateur.sweep.sweep import require_causal
from secateur.sweep.walk import SweepSettings, Walk

Logits = Callable[[ModelInputs, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class VariantFigures:
    """What was measured of one variant.

    Attributes:
        perplexity: on the windows.
        divergence: KL(dense || variant), nats, mean over the predicted tokens.
        divergence_error: its standard error, from the spread between windows; None for a single window.
        agreement: share of the predicted tokens whose likeliest one is the dense model's.
        nonzero_parameters: numbers stored that are not zero, as the variant would be written.
    """

    perplexity: Perplexity
    divergence: float
    divergence_error: float | None
    agreement: float
    nonzero_parameters: int

    @property
    def is_finite(self) -> bool:
        """Whether the figures are numbers; weights that overflow give none."""
        return math.isfinite(self.perplexity.value) and math.isfinite(self.divergence)


@dataclass(frozen=True)
class Measured:
    """The dense model, and its variants by name."""

    dense: Perplexity
    dense_nonzero_parameters: int
    variants: dict[str, VariantFigures]


@dataclass
class _Course:
    """One model on its way through the blocks.

    Attributes:
        realisation: what leaves it; None for the dense model.
        store: what enters the block that comes next.
        departed: whether it has left the dense model's course; until then both see the same.
        nonzero: numbers that are not zero in what was passed so far.
        own: the model in which its parts outside the blocks run, where they are not the dense model's.
    """

    realisation: Realisation | None
    store: BoundaryStore
    calls: BlockCalls
    departed: bool = False
    nonzero: int = 0
    own: Checkpoint | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def outside(self) -> Sequence[Removal]:
        return self.realisation.cut.outside if self.realisation is not None else ()


def measure_variants(
    checkpoint: Checkpoint, variants: Mapping[str, Realisation], windows: TokenWindows, settings: SweepSettings
) -> Measured:
    """Measure the dense model and all ``variants`` of it on the same windows ``(N, T)``.

    Logits exist for one micro-batch of windows at a time. Hidden states between blocks go to ``settings.scratch`` beyond
    ``settings.memory`` bytes.

    Raises:
        CalibrationError: a token id is outside the model's vocabulary.
        ModelError: the model is not a causal language model.
        SecateurError: the dense model's perplexity is not finite. A variant's may be: see ``VariantFigures.is_finite``.
    """
    require_causal(checkpoint)
    windows.check_vocabulary(checkpoint.config.get_text_config().vocab_size)
    return _VariantWalk(checkpoint, variants, windows, settings).run()


class _VariantWalk:
    def __init__(
        self,
        checkpoint: Checkpoint,
        variants: Mapping[str, Realisation],
        windows: TokenWindows,
        settings: SweepSettings,
    ) -> None:
        self.checkpoint, self.windows = checkpoint, windows
        self.walk = Walk(checkpoint, windows.ids_NT, settings, "variants")
        self.placement = settings.placement
        store = self.walk.store("dense")
        self.dense = _Course(None, store, BlockCalls([]))
        self.variants = {
            name: _Course(realisation, self.walk.store(str(number)), self.dense.calls)
            for number, (name, realisation) in enumerate(variants.items())
        }
        self.courses = [*self.variants.values(), self.dense]  # the dense model last: others may need its inputs

    @torch.no_grad()
    def run(self) -> Measured:
        with ExitStack() as stack:
            stack.enter_context(self.walk.ready())
            self._enter(stack)
            blocks = len(self.checkpoint.skeleton.blocks)
            models = f"{len(self.variants)} pruned model{'' if len(self.variants) == 1 else 's'}"
            with progress(f"Measuring {models}", blocks, "block", self.walk.tokens) as advance:
                for index in range(blocks):
                    with self.walk.block(index, ahead=index + 1) as block:
                        self._through(index, block)
                    for course in self.courses:
                        course.store.drop_behind(index + 1, forward=True)
                    advance()
            self._count_outside()
            self._predict(blocks)
            for course in self.courses:
                course.store.clear()
        return self._measured()

    # -- what precedes the blocks

    def _enter(self, stack: ExitStack) -> None:
        self.dense.calls = self.walk.enter(self.dense.store)
        for course in self.variants.values():
            course.calls = self.dense.calls
            if any(len(units) for _, units in course.outside):
                course.own, course.departed = _without_weights(self.checkpoint), True
                stack.enter_context(buffers_on(course.own.skeleton.model, self.placement))
                with masked_out_of(course.own.skeleton.model, course.outside):
                    course.calls = self._enter_own(course, course.own)

    def _enter_own(self, course: _Course, own: Checkpoint) -> BlockCalls:
        def take(batch: int, x_BTD: torch.Tensor) -> None:
            course.store.put((0, batch), x_BTD)

        inputs = [named_inputs(ids) for ids in self.walk.ids]
        return enter(own, inputs, take, _masking(course.outside), self.placement)

    # -- the blocks

    def _through(self, index: int, block: nn.Module) -> None:
        weights = block.state_dict()
        dense_nonzero = _nonzero(weights)
        for course in self.variants.values():
            self._variant_through(course, index, block, weights, dense_nonzero)
        self.dense.nonzero += dense_nonzero
        self._run(self.dense, index, partial(self.dense.calls.run, block, index))

    def _variant_through(
        self, course: _Course, index: int, block: nn.Module, weights: dict[str, torch.Tensor], dense_nonzero: int
    ) -> None:
        assert course.realisation is not None
        if index in course.realisation.cut.dropped:
            self._run(course, index, lambda batch, x_BTD: x_BTD)
            return
        decision = _on(self.placement, course.realisation.decision(index))
        masked = decision.in_dense_shapes(weights)
        changed = any(masked[name] is not tensor for name, tensor in weights.items())
        if not changed and not any(len(units) for _, units in decision.removals):
            course.nonzero += dense_nonzero
            if course.departed:
                self._run(course, index, partial(course.calls.run, block, index))
            return
        course.nonzero += _nonzero(decision.carry_out(weights))
        block.load_state_dict(masked, assign=True)
        del masked
        with masked_out_of(block, decision.removals):
            self._run(course, index, partial(course.calls.run, block, index))
        block.load_state_dict(weights, assign=True)

    def _run(self, course: _Course, index: int, call: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        """All micro-batches through one block; a variant that changes for the first time begins from the dense inputs."""
        own = course is self.dense or course.departed
        source = course.store if own else self.dense.store
        for batch, x_BTD in self.walk.stream(source, index, keep=not own):
            course.store.put((index + 1, batch), call(batch, x_BTD))
        course.departed = course is not self.dense

    # -- what follows the blocks

    def _predict(self, blocks: int) -> None:
        """The head, window by window: once for all whose head is the dense one, and once more for each other variant."""
        shared = [course for course in self.variants.values() if course.own is None]
        for group in [shared, *([course] for course in self.variants.values() if course.own is not None)]:
            with head(self.checkpoint, self.dense.calls, placement=self.placement) as logits, ExitStack() as stack:
                own = {id(course): stack.enter_context(self._head_of(course, logits)) for course in group}
                self._tally(blocks, group, logits, own)

    @contextmanager
    def _head_of(self, course: _Course, dense: Logits) -> Iterator[Logits]:
        if course.own is None:
            yield dense
            return
        model, change = course.own.skeleton.model, _masking(course.outside)
        with masked_out_of(model, course.outside), head(course.own, course.calls, change, self.placement) as logits:
            yield logits

    def _tally(self, blocks: int, group: Sequence[_Course], dense: Logits, own: Mapping[int, Logits]) -> None:
        streams = {id(c): self.walk.stream(c.store, blocks) for c in group if c.departed}
        first = not self.dense.tally.losses
        with progress("Comparing predictions", len(self.walk.ids)) as advance:
            for batch, x_BTD in self.walk.stream(self.dense.store, blocks, keep=True):
                ids_BT = self.walk.ids[batch]
                inputs = named_inputs(ids_BT)
                log_p_BMV = log_probabilities(dense(inputs, x_BTD))
                if first:
                    self.dense.tally.add_loss(ids_BT, log_p_BMV)
                for course in group:
                    if id(course) in streams:
                        _, y_BTD = next(streams[id(course)])
                        log_q_BMV = log_probabilities(own[id(course)](inputs, y_BTD))
                    else:
                        log_q_BMV = log_p_BMV
                    course.tally.add(ids_BT, log_p_BMV, log_q_BMV)
                advance()

    # -- figures

    def _count_outside(self) -> None:
        """Numbers outside the blocks that are not zero, one tensor in memory at a time."""
        for name in self.checkpoint.outer_names():
            tensors = self.checkpoint.read([name])
            dense_nonzero = _nonzero(tensors)
            for course in self.courses:
                cut = _touching(course.outside, [name])
                course.nonzero += _nonzero(cut_tensors(tensors, cut)) if cut else dense_nonzero

    def _measured(self) -> Measured:
        dense = self._perplexity(self.dense)
        if not math.isfinite(dense.value):
            raise not_finite(dense, self.windows)
        figures = {}
        for name, course in self.variants.items():
            divergence, error = mean_and_error(course.tally.divergences)
            agreement, _ = mean_and_error(course.tally.agreements)
            figures[name] = VariantFigures(self._perplexity(course), divergence, error, agreement, course.nonzero)
        return Measured(dense, self.dense.nonzero, figures)

    def _perplexity(self, course: _Course) -> Perplexity:
        return perplexity_of(torch.cat(course.tally.losses), self.windows, self.placement.dtype)


def _without_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The same files under a second weightless model, whose parts outside the blocks can be in memory beside the first's."""
    skeleton = build_skeleton(copy.deepcopy(checkpoint.config), trust_remote_code=True)  # it was allowed for the first
    return Checkpoint(checkpoint.source, skeleton, checkpoint.tensors)


def _on(placement: Placement, decision: BlockDecision) -> BlockDecision:
    """The decision with its masks where the block computes."""
    return replace(decision, masks={name: mask_OI.to(placement.device) for name, mask_OI in decision.masks.items()})


def _masking(outside: Sequence[Removal]) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: mask_tensors(tensors, _touching(outside, list(tensors)))


def _touching(outside: Sequence[Removal], names: Sequence[str]) -> list[Removal]:
    """What leaves outside the blocks, as far as it is in these tensors."""
    parts = [(within(group, names), units) for group, units in outside]
    return [removal for removal in parts if removal[0].members]


def _nonzero(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(int(tensor.count_nonzero()) for tensor in tensors.values())
