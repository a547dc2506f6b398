"""What of lm-eval's own task definitions is more than a template, for rows of the shape that ``local`` reads."""

from __future__ import annotations

import re
from typing import Any

_LAST_SENTENCE = re.compile(r"^(.*[.!?][\"')\]]*\s+|[^:]*:\s+)?(.*)$", re.DOTALL)
"""What precedes the last sentence of a context, and that sentence. With no sentence before it the activity's name stays apart."""


def hellaswag(documents: Any) -> Any:
    """Add the ``query`` and clean it and the ``choices``, as HellaSwag is prompted.

    HellaSwag gives a context in two parts and lm-eval sets the second, an unfinished sentence, in sentence case. Rows here have
    both in one ``ctx``: what follows its last full stop is the second part; a context that ends with a full stop has none.
    """

    def prompt(document: dict[str, Any]) -> dict[str, Any]:
        return {
            "query": _clean(in_sentence_case(document["ctx"])),
            "choices": [_clean(choice) for choice in document["choices"]],
        }

    return documents.map(prompt)


def in_sentence_case(context: str) -> str:
    """The context with its last sentence capitalised, if that is unfinished."""
    context = context.strip()
    if context.rstrip("\"')]").endswith((".", "!", "?")):
        return context
    match = _LAST_SENTENCE.match(context)
    assert match is not None
    before, last = match.groups(default="")
    return before + last.capitalize()


def winogrande_label(document: dict[str, Any]) -> int:
    """Which of the beginnings is the right one."""
    return int(document["label"])


def winogrande_rest(document: dict[str, Any]) -> str:
    """What follows the gap: the part whose likelihood is compared."""
    return document["sentence"].partition("_")[2].strip()


def winogrande_beginnings(document: dict[str, Any]) -> list[str]:
    """The sentence up to the gap with each of the choices in it."""
    before = document["sentence"].partition("_")[0]
    return [before + choice for choice in document["choices"]]


def _clean(text: str) -> str:
    """Without the marks that WikiHow's articles left: titles become sentences, other bracketed marks go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
