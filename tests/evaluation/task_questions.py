"""A few questions of every task that comes with a definition, in words that the tiny tokenizer knows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from evaluation_model import VOCABULARY

from secateur.evaluation.tasks.local import KNOWN

COUNT = 5


def questions() -> dict[str, list[dict[str, Any]]]:
    """``COUNT`` rows of each task, by the name of the task."""
    rng = random.Random(0)

    def words(most: int = 5) -> str:
        return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(rng.randint(2, most)))

    def choices(count: int) -> dict[str, Any]:
        return {"choices": [words() for _ in range(count)], "label": rng.randrange(count)}

    rows: dict[str, list[dict[str, Any]]] = {}
    for task, known in KNOWN.items():
        rows[task] = []
        for number in range(COUNT):
            row: dict[str, Any] = {column: words(9) for column in known.text}
            if known.choices is not None:
                row |= choices(known.choices or 3 + number % 3)
            elif known.labels:
                row |= {"label": number % 2}
            rows[task].append(row)
    for row in rows["winogrande"]:
        row["sentence"] = f"{words()} _ {words()}"
    for number, row in enumerate(rows["hellaswag"]):
        row["ctx"] = f"Topic: {words()}. {words()}" if number % 2 else f"Topic: [header] {words()} [title] {words()}."
        row["choices"][0] += " [step] w5  w6."
    return rows


def written(folder: Path, rows: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """``rows`` in files as the tasks name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, lines in (questions() if rows is None else rows).items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / KNOWN[task].files[0]).write_text(text, encoding="utf-8")
    return folder


def as_published(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns of the data set that lm-eval's own definition of ``task`` reads."""
    if task == "piqa":
        return {"goal": row["goal"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["label"]}
    if task == "winogrande":
        first, second = row["choices"]
        return {"sentence": row["sentence"], "option1": first, "option2": second, "answer": str(row["label"] + 1)}
    if task == "hellaswag":
        activity, context = row["ctx"].split(": ", 1)
        unfinished = not context.endswith(".")
        ctx_a, ctx_b = context.rsplit(". ", 1) if unfinished else (context, "")
        return {
            "activity_label": activity,
            "ctx_a": ctx_a + "." if unfinished else ctx_a,
            "ctx_b": ctx_b,
            "endings": row["choices"],
            "label": str(row["label"]),
        }
    if task in ("arc_easy", "arc_challenge", "openbookqa"):
        letters = list("ABCDE")[: len(row["choices"])]
        stem = "question_stem" if task == "openbookqa" else "question"
        choices = {"text": row["choices"], "label": letters}
        return {stem: row["question"], "choices": choices, "answerKey": letters[row["label"]]}
    return dict(row)
