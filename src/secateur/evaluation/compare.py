"""Several models side by side: the same text, the same machine, taking turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from secateur import loading
from secateur.calibration import TokenWindows, text_windows
from secateur.calibration.tokenise import load_tokenizer
from secateur.console import log
from secateur.errors import CalibrationError, SecateurError
from secateur.evaluation.continuation import continuations
from secateur.evaluation.divergence import Divergence
from secateur.evaluation.efficiency import DECODE_STEPS, Size, Speed, measure_speed, size_of
from secateur.evaluation.perplexity import Perplexity, side_by_side, vocabulary_of
from secateur.files import human_bytes, human_count

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_MAX_WINDOWS = 32
SPEED_TOKENS = 128
"""Tokens of the forward that is timed and whose MACs are counted: a prompt of ordinary length."""

SPEED_BATCHES = (1, 8)
"""Sequences at once for which speed is measured: one user, and a few."""

PROMPT = "The three most important things to know about growing apple trees are"
"""What models continue where nothing else is asked for."""

CONTINUED = 40
"""Tokens of a continuation."""

MOST_WITH_RATIOS = 3
"""With more models than this, ratios to the first would not fit a terminal of 100 columns."""


@dataclass(frozen=True)
class ModelFigures:
    """All that was measured of one model.

    Attributes:
        speed: by ``prefill, batch B`` and ``decode, batch B``; None where it was not asked for.
        divergence: from the first model; None for itself, for one with another tokenizer, and without speed, when models are
            in memory one at a time.
    """

    folder: str
    perplexity: Perplexity
    size: Size
    speed: dict[str, Speed] | None
    divergence: Divergence | None = None


@dataclass(frozen=True)
class Evaluation:
    """Models by name, in the order given; ratios are to the first.

    Attributes:
        models: the figures of each.
        protocol: what perplexity and speed were measured on and how, for people.
        text: the text source as given.
        windows_sha256: identifies the token windows exactly.
        continuations: by prompt, what each model wrote after it.
    """

    models: dict[str, ModelFigures]
    protocol: str
    text: str
    windows_sha256: str
    continuations: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, strings and numbers."""
        return asdict(self)

    def table(self) -> Table:
        """The figures for people, one model a column, in at most 100 columns of text."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        columns = {name: _rows(figures, len(self.models) <= MOST_WITH_RATIOS) for name, figures in self.models.items()}
        first = next(iter(columns))
        with_ratios = 1 < len(columns) <= MOST_WITH_RATIOS
        note = f"; ratios are to {first}" if with_ratios else ""
        table = Table(box=SIMPLE_HEAD, header_style="bold", caption=f"lower perplexity is better{note}")
        table.add_column("")
        for name in columns:
            table.add_column(name, justify="right", overflow="fold")
            if with_ratios and name != first:
                table.add_column("ratio", justify="right", style="dim", no_wrap=True)
        for label in dict.fromkeys(label for rows in columns.values() for label in rows):
            yardstick, _ = columns[first].get(label, (None, ""))
            cells = [label]
            for name, rows in columns.items():
                value, shown = rows.get(label, (None, ""))
                cells.append(shown)
                if with_ratios and name != first:
                    cells.append("" if value is None or yardstick is None else f"{value / yardstick:.2f}×")
            table.add_row(*cells)
        return table


def evaluate(
    models: Mapping[str, Path],
    *,
    text: str = "python-docs",
    window_length: int | None = None,
    max_windows: int | None = DEFAULT_MAX_WINDOWS,
    load: Callable[[Path], nn.Module] | None = None,
    speed: bool = True,
    repeats: int = 5,
    batch_size: int = 1,
    speed_batches: Sequence[int] = SPEED_BATCHES,
    prompts: Sequence[str] = (),
) -> Evaluation:
    """Measure models on the same token windows, cut with the first one's tokenizer.

    With ``speed`` all models are in memory together, since they take turns; without it one at a time.

    Args:
        models: name to folder; the first is what the others are compared with.
        text: as ``--calibration``, but not ``self``.
        window_length: tokens of context; 512 by default, what it holds for a safetensors file.
        max_windows: how many windows from the start of the text; None takes all.
        load: turns a folder into a model; by default ``secateur.load`` in float32, safetensors only.
        speed: whether to time them.
        repeats: how often each is timed.
        batch_size: windows at once for perplexity.
        speed_batches: sequences at once for speed.
        prompts: beginnings that every model continues, with the first one's tokenizer; left out where there is none.

    Raises:
        CalibrationError: the text cannot be used.
        ModelError: a model does not load.
        SecateurError: no models, or a perplexity that is not finite.
    """
    if not models:
        raise SecateurError("there is no model to evaluate; name at least one")
    load = load or loading.load
    windows = text_windows(text, next(iter(models.values())), window_length, max_windows)
    prompt_1T = windows.ids_NT[:1, :SPEED_TOKENS]
    figures: dict[str, tuple[Perplexity, Divergence | None]] = {}
    sizes: dict[str, Size] = {}
    resident: dict[str, nn.Module] = {}
    written: dict[str, dict[str, str]] = {prompt: {} for prompt in prompts}
    for name, folder in models.items():
        model = load(folder)
        sizes[name] = size_of(model, folder, prompt_1T)
        for prompt, texts in written.items():
            texts |= _continued({name: model}, next(iter(models.values())), prompt)
        if speed:
            resident[name] = model
        else:
            figures |= side_by_side({name: model}, windows, batch_size)
        del model
    speeds = {}
    if speed:
        figures = side_by_side(resident, windows, batch_size, _alike(models, resident))
        speeds = measure_speed(resident, prompt_1T, repeats, speed_batches)
    measured = {
        name: ModelFigures(str(models[name]), figures[name][0], sizes[name], speeds.get(name), figures[name][1])
        for name in models
    }
    said = {prompt: texts for prompt, texts in written.items() if texts}
    return Evaluation(measured, _protocol(measured, windows, prompt_1T.shape[1]), text, windows.sha256, said)


def _continued(model: Mapping[str, nn.Module], first: Path, prompt: str) -> dict[str, str]:
    try:
        tokenizer = load_tokenizer(first)
    except CalibrationError:
        return {}  # windows of token ids need none
    return continuations(model, tokenizer, prompt, CONTINUED)


def _alike(models: Mapping[str, Path], loaded: Mapping[str, nn.Module]) -> list[str]:
    """The models after the first whose token ids mean what the first's do."""
    first, *others = models
    vocabulary, tokens = vocabulary_of(loaded[first]), _tokens(models[first])
    alike = []
    for name in others:
        if vocabulary_of(loaded[name]) == vocabulary and _tokens(models[name]) == tokens:
            alike.append(name)
        else:
            log.warning("%s has another tokenizer than %s: figures a token do not compare.", name, first)
    return alike


def _tokens(folder: Path) -> dict[str, int] | None:
    try:
        return dict(load_tokenizer(folder).get_vocab())
    except CalibrationError:
        return None  # windows of token ids need none


def _protocol(models: Mapping[str, ModelFigures], windows: TokenWindows, prompt: int) -> str:
    # All models saw the same windows; their lines can only differ in the dtype.
    lines = list(dict.fromkeys(figures.perplexity.protocol for figures in models.values()))
    timed = next(iter(models.values())).speed
    first = next(iter(models))
    compared = any(figures.divergence for figures in models.values())
    beside = (
        f" KL({first} || model) in nats a token and the same likeliest token, on these windows." if compared else ""
    )
    text = f"Perplexity: {' / '.join(lines)}.{beside} MACs: one forward over {prompt} tokens, head included."
    if timed:
        one = next(iter(timed.values()))
        text += (
            f" Memory: weights and tensors alive, the same forward. Speed: prefill of the same {prompt} tokens at most, then decode "
            f"of {DECODE_STEPS} tokens a sequence after it; median of {one.repeats} ± half the distance between the quartiles, "
            "models taking turns."
        )
    return text


def _rows(figures: ModelFigures, with_error: bool) -> dict[str, tuple[float, str]]:
    """Each row's number, and how it is shown."""
    size, speed = figures.size, figures.speed
    rows: dict[str, tuple[float, str]] = {
        "perplexity": (figures.perplexity.value, f"{figures.perplexity.value:,.2f}"),
        "parameters": (size.parameters, human_count(size.parameters)),
        "parameters not zero": (size.nonzero_parameters, human_count(size.nonzero_parameters)),
        "weights on disk": (size.bytes_on_disk, human_bytes(size.bytes_on_disk)),
        "MACs per token": (size.macs_per_token, human_count(size.macs_per_token)),
        "peak memory": (size.peak_memory, human_bytes(size.peak_memory)),
    }
    if figures.divergence:
        error = figures.divergence.standard_error
        spread = "" if error is None or not with_error else f" ± {error:.4f}"
        rows["KL to the first"] = figures.divergence.value, f"{figures.divergence.value:.4f}{spread}"
        rows["same likeliest token"] = figures.divergence.agreement, f"{figures.divergence.agreement:.1%}"
    for what, timed in (speed or {}).items():
        rows[what] = timed.latency, _milliseconds(timed.latency, timed.latency_spread if with_error else None)
    for what, timed in (speed or {}).items():
        rows[f"tokens/s, {what}"] = timed.tokens_per_second, f"{timed.tokens_per_second:,.0f}"
    return rows


def _milliseconds(seconds: float, spread: float | None) -> str:
    digits = 0 if seconds >= 0.1 else 1
    beside = "" if spread is None else f" ± {1000 * spread:,.{digits}f}"
    return f"{1000 * seconds:,.{digits}f}{beside} ms"
