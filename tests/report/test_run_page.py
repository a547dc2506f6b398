"""The page of a run: written by every stage, complete, honest, escaped, and part of a result like any other file."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from pathlib import Path

import pytest

import secateur
from secateur.comparison.result import Row
from secateur.plans import load_plan
from secateur.report.measured import MEASURED, PERPLEXITY, TASKS, note_measured, read_measured
from secateur.report.page import PAGE, write_run_page
from secateur.report.page.charts import LABEL, LANE, SHORT, front, heat_map, pareto, task_scores, telling, turned_away
from secateur.report.page.comparison import _verdict
from secateur.report.page.run import run_facts, shares_of
from secateur.report.page.verdict import verdict
from secateur.report.words import without_folders

pytestmark = [pytest.mark.usefixtures("same_process"), pytest.mark.pages]


@pytest.fixture
def cut(llama_folder: Path, windows_file: Path, tmp_path: Path) -> Path:
    secateur.prune(str(llama_folder), tmp_path / "cut", unit="head,channel", ratio=0.5, calibration=str(windows_file))
    return tmp_path / "cut"


def record_of(folder: Path) -> dict:
    return json.loads((folder / "secateur" / "run.json").read_text())


def facts_of(folder: Path) -> dict:
    return run_facts(folder, record_of(folder))


def values_of(spec: dict) -> list[dict]:
    """All rows of a chart's data, which Altair may have moved into named datasets."""
    found = list(spec.get("data", {}).get("values", []))
    for layer in spec.get("layer", []):
        found += layer.get("data", {}).get("values", [])
    return found + [row for rows in spec.get("datasets", {}).values() for row in rows]


def test_prune_and_apply_write_a_page_that_needs_nothing_else(cut, tmp_path):
    secateur.apply(cut, tmp_path / "again")
    for folder in (cut, tmp_path / "again"):
        page = (folder / PAGE).read_text()
        assert "vegaEmbed" in page
        outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", outside)
        assert "default-src 'none'" in html.unescape(page)
        assert "has not been measured" in page


def test_the_map_is_what_the_plan_takes(cut):
    plan = load_plan(cut)
    cells = {(row["part"], row["block"]): row for row in values_of(facts_of(cut)["where"])}
    for entry in plan.blocks:
        for one in entry.cuts:
            cell = cells.pop((one.kind, entry.block))
            assert (cell["gone"], cell["of"]) == (len(one.removed), one.count)
            assert cell["share"] == len(one.removed) / one.count
    assert not cells


@pytest.mark.parametrize("share", [0.0003, 0.1999, 1.0])
def test_the_legend_of_the_map_reaches_what_its_cells_hold(share):
    cells = {"channel": {0: {"share": share, "gone": 1, "of": 1}}}
    shown = heat_map(cells, 1)["encoding"]["opacity"]["legend"]["values"]
    assert (shown[0], shown[-1]) == (0, share)


def test_masks_are_shown_by_matrix_with_their_scores(llama_folder, windows_file, tmp_path):
    secateur.prune(
        str(llama_folder),
        tmp_path / "sparse",
        criterion="wanda",
        unit="weight",
        ratio=0.3,
        calibration=str(windows_file),
    )
    plan = load_plan(tmp_path / "sparse")
    shares, _ = shares_of(plan)
    masks = plan.blocks[0].masks
    assert shares["self_attn.q_proj"][0]["gone"] == masks["self_attn.q_proj.weight"].zeros
    assert len(facts_of(tmp_path / "sparse")["scores"]) == len(masks)
    for name, spread in plan.blocks[0].scores.items():
        gone, kept = sum(spread.gone) + spread.nothing[1], sum(spread.kept) + spread.nothing[0]
        assert (gone, gone + kept) == (masks[name].zeros, masks[name].shape[0] * masks[name].shape[1])


@pytest.mark.parametrize(
    "recipe",
    [
        dict(criterion="influence", unit="block", ratio=0.5),
        dict(criterion="angular", unit="block", ratio=0.5),
        dict(criterion="sparsegpt", unit="weight", ratio=0.5),
        dict(criterion="taylor", unit="channel", ratio=0.5, steps=2),
        dict(criterion="taylor", unit="hidden", ratio=0.25),
        dict(criterion="taylor", unit="head,channel", ratio=0.3, allocation="global"),
        dict(criterion="gblm", unit="2:4"),
        dict(criterion="taylor", unit="channel", ratio=0.3, allocation="sensitivity"),
    ],
    ids=lambda recipe: f"{recipe['criterion']} {recipe['unit']}",
)  # fmt: skip
def test_every_kind_of_run_has_a_page(recipe, llama_folder, windows_file, tmp_path):
    secateur.prune(str(llama_folder), tmp_path / "out", calibration=str(windows_file), **recipe)
    facts = facts_of(tmp_path / "out")
    assert facts["where"] is not None or recipe["unit"] == "hidden"
    assert facts["removed"]
    assert (tmp_path / "out" / PAGE).stat().st_size > 100_000


def test_what_was_removed_is_never_called_left(cut):
    page = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", (cut / PAGE).read_text(), flags=re.DOTALL)
    assert "<h2>What was removed</h2>" in page
    assert "The stronger the colour, the more was removed." in page
    assert not re.search(r"\b(left|leaves|gone)\b(?!\")", page)


def test_what_is_measured_later_goes_into_page_and_card(cut, windows_file, tmp_path, command):
    secateur.recover(cut, tmp_path / "tuned", data=str(windows_file), steps=2, batch_size=2)
    assert command("evaluate", tmp_path / "tuned", "--text", windows_file)[0] == 0
    facts = facts_of(tmp_path / "tuned")
    assert facts["tables"][0].heads == ["model", "cut", "tuned"]  # dense, pruned and recovered
    assert any("perplexity" in part for part in facts["verdict"])
    assert any("decode" in part for part in facts["verdict"])
    shown = dict(facts["tables"][0].rows)
    timed = read_measured(tmp_path / "tuned")["evaluation"]["models"]["tuned"]["speed"]["decode, batch 8"]
    latency, spread = 1000 * timed["latency"], 1000 * timed["latency_spread"]
    assert shown["decode, batch 8, ms"][2].text == f"{latency:,.1f} ±\u00a0{spread:,.1f}"
    rate, spread = timed["tokens_per_second"], timed["tokens_per_second_spread"]
    assert shown["decode, batch 8, tokens/s"][2].text == f"{rate:,.1f} ±\u00a0{spread:,.1f}"
    assert all(" ±\u00a0" in cell.text for cell in shown["KL to dense, nats a token"][1:])
    assert facts["training"]["lines"][0].startswith("lora")
    losses = [row["loss"] for row in values_of(facts["training"]["chart"]) if row["on"] == "training"]
    assert losses == record_of(tmp_path / "tuned")["training"]["losses"]
    value = read_measured(tmp_path / "tuned")["evaluation"]["models"]["tuned"]["perplexity"]["value"]
    for file in (PAGE, "README.md"):
        assert f"{value:,.2f}" in (tmp_path / "tuned" / file).read_text()
    assert "--batch-size 2 --steps 2" in facts["reproduce"]
    # Nobody counts parameters from the pruned model: the dense one is what was there before.
    assert facts["verdict"][0] == run_facts(cut, record_of(cut))["verdict"][0]


def test_tasks_are_shown_with_their_errors(cut):
    score = {"value": 0.5, "standard_error": 0.05, "higher_is_better": True}
    own = {"folder": str(cut), "dtype": "float32", "scores": {"piqa": {"acc": score, "acc_norm": score}}, "cut": 0}
    models = {
        "model": own | {"means": {"acc_norm": score}, "kept": {}},
        "cut": own | {"means": {"acc_norm": score | {"value": 0.4}}, "kept": {"acc_norm": 0.8}},
    }
    tasks = {"models": models, "questions": {"piqa": 10}, "versions": {}, "protocol": "as asked"}
    note_measured(cut, TASKS, {**tasks, "roles": {"own": "cut", "dense": "model"}})
    facts = facts_of(cut)
    rows = values_of(facts["tasks"]["chart"])
    assert {(row["model"], row["low"], row["high"]) for row in rows} == {("model", 0.45, 0.55), ("cut", 0.45, 0.55)}
    kept = "80.0% of the dense model's task scores kept"
    assert f"{kept} (0.400 ±\u00a00.050 beside 0.500 ±\u00a00.050, 10 questions in 1 task)" in facts["verdict"]
    page = write_run_page(cut).read_text()
    assert "0.500 ± 0.050" in page


@pytest.mark.parametrize("tasks", [1, 7])
@pytest.mark.parametrize("models", [1, 3])
def test_every_model_has_a_lane_of_its_own_in_the_chart_of_tasks(tasks, models):
    rows = [
        {"task": f"task {task}", "metric": "acc", "model": f"model {model}", "value": 0.5, "error": 0.1}
        for task in range(tasks)
        for model in range(models)
    ]
    spec = task_scores(rows, [f"model {model}" for model in range(models)])
    assert spec["height"] >= LANE * tasks * models + 60
    assert all(layer["encoding"]["yOffset"]["field"] == "model" for layer in spec["layer"])


def test_each_measurement_has_names_of_its_own(cut):
    """Tasks and perplexity measured apart, and the yardstick of neither first: the verdict has both, against the dense model."""
    figures = {"perplexity": {"value": 20.0}, "speed": {}}
    text = {
        "roles": {"own": "cut", "dense": "model"},
        "models": {"cut": figures | {"perplexity": {"value": 30.0}}, "model": figures},
    }
    means = {"mine": {"value": 0.3}, "other": {"value": 0.6}, "theirs": {"value": 0.4}}
    tasks = {
        "roles": {"own": "mine", "dense": "theirs"},
        "models": {name: {"means": {"acc": mean}, "kept": {"acc": 0.1}} for name, mean in means.items()},
    }
    record = record_of(cut)
    parts = verdict(record["before"], record["after"], {PERPLEXITY: text, TASKS: tasks})
    assert parts[1:] == [
        "perplexity 20.00 → 30.00",
        "75.0% of the dense model's task scores kept (0.300 beside 0.400)",
    ]
    alone = {TASKS: tasks | {"roles": {"own": "mine", "dense": None}}}
    assert len(verdict(record["before"], record["after"], alone)) == 1


@pytest.mark.parametrize(
    ("spread", "said"),
    [
        (0.0099, "decode, batch 1: 1.25 × as fast"),
        (0.0101, "decode, batch 1: as fast as the dense model within the spread of the measurement"),
    ],
)
def test_a_speed_is_told_where_both_spreads_together_are_less_than_the_difference(cut, spread, said):
    figures = {"perplexity": {"value": 20.0}}
    models = {
        name: figures | {"speed": {"decode, batch 1": {"latency": latency, "latency_spread": spread}}}
        for name, latency in {"dense": 0.1, "pruned": 0.08}.items()
    }
    record = record_of(cut)
    assert said in verdict(record["before"], record["after"], {PERPLEXITY: {"models": models}})


def test_a_card_that_somebody_wrote_anew_is_left_alone(cut, windows_file, command):
    (cut / "README.md").write_text("mine")
    assert command("evaluate", cut, "--text", windows_file, "--no-speed")[0] == 0
    assert (cut / "README.md").read_text() == "mine"
    assert "perplexity" in (cut / PAGE).read_text()


def test_a_folder_that_cannot_be_written_is_measured_all_the_same(cut, windows_file, command, monkeypatch):
    before = (cut / PAGE).read_bytes()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    code, out, said = command("evaluate", cut, "--text", windows_file, "--no-speed")
    assert code == 0
    assert "perplexity" in out
    assert "cannot be written" in said
    assert (cut / PAGE).read_bytes() == before


def test_words_of_a_model_cannot_become_part_of_the_page(cut, windows_file):
    evil = "</script><script>alert(1)</script><!-- {{ 7 * 7 }}"
    secateur.evaluate([str(cut)], text=str(windows_file), speed=False)
    content = read_measured(cut)["evaluation"]
    content["continuations"] = {evil: {evil: evil}}
    content["protocol"] = evil
    note_measured(cut, "evaluation", content)
    page = write_run_page(cut).read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "49" not in page.split("alert(1)")[1][:40]


def test_the_same_run_gives_the_same_page(llama_folder, windows_file, tmp_path):
    from resumable import contents

    pages = []
    for _ in range(2):
        secateur.prune(str(llama_folder), tmp_path / "out", unit="channel", ratio=0.5, calibration=str(windows_file))
        pages.append(contents(tmp_path / "out")[PAGE])
        shutil.rmtree(tmp_path / "out")
    assert pages[0] == pages[1]


def test_a_damaged_measurement_is_as_none(cut):
    (cut / "secateur" / MEASURED).write_text("{")
    assert read_measured(cut) == {}
    write_run_page(cut)


def test_the_front_of_a_cloud():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (3.0, 4.0), (1.0, 5.0)]
    assert front(points) == {0, 1, 4}
    assert front([(118.28e6, 9.0), (118.25e6, 10.0)]) == {0}  # less than a thousandth is no smaller


@pytest.mark.parametrize("costs", [(118.28e6, 118.281e6), (118e6, 118e6), (50e6, 100e6)])
def test_the_axis_of_costs_has_a_width_that_tells_its_numbers_apart(costs):
    rows = [{"name": f"{cost}", "cost": cost, "perplexity": 10.0, "page": None} for cost in costs]
    spec = pareto(rows, "size", SHORT, 9.0)
    x = next(own for layer in spec["layer"] if "axis" in (own := layer["encoding"].get("x", {})))
    low, high = x["scale"]["domain"]
    assert low <= min(costs) <= max(costs) <= high
    assert high - low >= 0.05 * max(costs) * 0.999
    assert {row["perplexity"] for row in values_of(spec)} == {9.0, 10.0}  # the dense model has a line
    assert all(row["label"] for row in values_of(spec))


def test_the_folders_of_this_machine_are_not_published(cut, windows_file):
    assert windows_file.is_absolute()
    for file in (PAGE, "README.md"):
        text = re.sub(r"<script>.*?</script>", "", (cut / file).read_text(), flags=re.DOTALL)
        assert windows_file.name in text
        assert str(windows_file.parent) not in text
    assert without_folders("on /a b/c.txt: all", "/a b/c.txt") == "on c.txt: all"
    kept = "from https://pypi.org/project/x, wikitext/raw and 3 / 4; ../text"
    assert without_folders(f"{kept} and /some/where/tasks; no") == f"{kept} and tasks; no"


def test_labels_keep_what_tells_recipes_apart():
    assert telling(["preset=fast unit=channel ratio=0.2", "magnitude unit=channel ratio=0.2"]) == [
        "preset=fast",
        "magnitude",
    ]
    assert telling(["wanda unit=2:4"]) == ["wanda unit=2:4"]
    long = telling([f"taylor {'a' * 40} seed={seed}" for seed in (1, 2)] + ["b " * 30])
    assert len(set(long)) == 3
    assert max(map(len, long)) <= LABEL + 1


def test_a_ruined_model_is_not_praised():
    def row(name: str, perplexity: float, seconds: float) -> Row:
        return Row(name, [0], {"perplexity": [perplexity], "seconds": [seconds]}, [])

    dense, good, ruined = row("dense", 30.0, 0), row("good", 49.43, 66), row("ruined", 11656245.09, 38)
    ruin = "ruined ruins the model (perplexity 1.17e7)"
    assert _verdict(dense, [good, ruined]) == ["dense perplexity 30.00", "good comes nearest with 49.43", ruin]
    assert _verdict(dense, [ruined]) == ["dense perplexity 30.00", ruin]


def test_zeros_that_the_model_came_with_are_not_called_its_loss(cut):
    before, after = record_of(cut)["before"], record_of(cut)["after"]
    record = record_of(cut) | {"before": before | {"zeros": before["prunable"] // 25}}
    record["after"] = after | {"zeros": after["prunable"] // 25}
    left = [what for what, _, _ in run_facts(cut, record)["removed"]]
    assert left == ["channel units", "head units", "query units", "parameters"]
    record["after"] = after | {"zeros": after["prunable"] // 2}
    assert "weights of the blocks' matrices zeroed" in [what for what, _, _ in run_facts(cut, record)["removed"]]


def test_sizes_close_to_each_other_are_told_apart_on_the_axis():
    def axis(*costs: float) -> str:
        rows = [{"name": str(cost), "cost": cost, "perplexity": 10.0 - cost / 1e9, "page": None} for cost in costs]
        spec = pareto(rows, "size", SHORT, 9.0)
        return next(
            layer["encoding"]["x"]["axis"]["format"]
            for layer in spec["layer"]
            if "axis" in layer["encoding"].get("x", {})
        )

    assert axis(50e6, 100e6) == ".3~s"
    assert axis(118.25e6, 118.36e6) == axis(118e6, 118e6) == ".4~s"


def test_a_name_stands_where_the_next_point_is_farther():
    """238, 79.3 and 73.3, 58.7 and 57.2: neighbours turn away from each other."""
    assert turned_away([79.3, 73.3, 238.0, 58.7, 57.2]) == [True, False, True, True, False]
    assert turned_away([5.0]) == [True]
    assert turned_away([5.0, 5.0]) == [False, True]
