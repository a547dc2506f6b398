"""A run that died goes on: in this process raising at chosen points, and killed for good in processes of its own."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from resumable import RECIPES, different
from tiny_models import tiny_llama

import secateur
from secateur import planning, realise, resuming, run, runfolder, stepping
from secateur.blockstore import BlockStore
from secateur.checkpoint.writer import ShardWriter
from secateur.errors import CalibrationError, OutputError, ResourceError, Stopped
from secateur.lock import FolderLock
from secateur.plans import Plan
from secateur.realise import Realisation
from secateur.runlog import read_events


class Died(BaseException):
    """Stands in for ``kill -9``: nothing of ours catches it by name."""


def raising_at(monkeypatch, owner, name: str, call: int, error: BaseException) -> None:
    """Let the ``call``-th call of ``owner.name`` raise, before it does anything."""
    original, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


@contextmanager
def dying_at(monkeypatch, owner, name: str, call: int, error: BaseException) -> Iterator[None]:
    with monkeypatch.context() as patched:
        raising_at(patched, owner, name, call, error)
        with pytest.raises(type(error)):
            yield


def words_to_fields(words: list[str]) -> dict[str, str]:
    return {flag.lstrip("-"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


POINTS = {
    "before deciding": (run, "make_decision", 1),
    "a block's scores": (BlockStore, "put", 2),
    "saving the plan": (Plan, "save", 1),
    "writing a block": (ShardWriter, "write", 3),
    "closing the weights": (ShardWriter, "close", 1),
    "writing the manifest": (realise, "write_manifest", 1),
    "checking": (Realisation, "verify", 1),
    "the card": (run, "write_card", 1),
    "the record": (run, "write_json", 1),
    "before the renaming": (runfolder, "_replace", 1),
    "tidying up": (runfolder, "_tidy", 1),
}


EVERYWHERE = (
    "taylor channels",
    "wanda 2:4, pruned",
    "sparsegpt weight, each block its own share",
    "taylor channels, global, refitted, blocks fitted",
)
DEATHS = [(point, recipe) for recipe in EVERYWHERE for point in POINTS]
DEATHS += [(point, "flap head,channel, biases") for point in ("saving the plan", "writing a block")]


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(("point", "recipe"), DEATHS)
def test_what_died_anywhere_is_finished_with_the_same_bytes(
    point, recipe, llama_folder, windows_file, tmp_path, monkeypatch
):
    owner, name, call = POINTS[point]
    if recipe.startswith(("wanda", "sparsegpt")) and name == "put":
        pytest.skip("pruned propagation keeps no scores")
    fields = dict(calibration=str(windows_file), **words_to_fields(RECIPES[recipe]))
    secateur.prune(str(llama_folder), tmp_path / "straight", **fields)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "other-cache"))
    with dying_at(monkeypatch, owner, name, call, Died()):
        secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    assert (tmp_path / "out.partial").exists() != (name == "_tidy")
    secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    assert different(tmp_path / "straight", tmp_path / "out") == []
    assert not (tmp_path / "out.partial").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("same_process")
def test_a_run_with_an_evaluation(llama_folder, windows_file, tmp_path, monkeypatch):
    fields = dict(unit="channel", calibration=str(windows_file), evaluate_on=str(windows_file))
    secateur.prune(str(llama_folder), tmp_path / "straight", **fields)
    with dying_at(monkeypatch, run, "write_card", 1, Died()):
        secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    assert different(tmp_path / "straight", tmp_path / "out") == []


@pytest.mark.usefixtures("same_process")
def test_what_was_done_is_not_done_again(llama_folder, windows_file, tmp_path, monkeypatch, command):
    words = [
        "prune",
        llama_folder,
        "--out",
        tmp_path / "out",
        "--calibration",
        windows_file,
        *RECIPES["wanda 2:4, pruned"],
    ]
    with monkeypatch.context() as patched:
        raising_at(patched, Realisation, "verify", 1, Stopped())
        code, _, err = command(*words)
    assert code == 2
    assert "the same command goes on from there" in err
    resuming.note_finished(tmp_path / "out.partial" / "scratch", 2, 3)
    monkeypatch.setattr(planning.Planner, "plan", lambda self: pytest.fail("decided once more"))
    code, _, err = command(*words)
    assert code == 0, err
    assert f"Going on with {tmp_path / 'out.partial'}: what leaves was decided, and 2 of 3 blocks were finished." in err
    record = json.loads((tmp_path / "out" / "secateur" / "run.json").read_text())
    assert [attempt["end"] for attempt in record["attempts"]] == ["interrupted", "finished"]
    assert record["seconds"] == pytest.approx(sum(attempt["seconds"] for attempt in record["attempts"]), abs=0.02)
    assert set(record["stages"]) == {"choosing", "writing", "checking"}
    events = read_events(tmp_path / "out" / "secateur" / "log.jsonl")
    assert [line["goes_on"] for line in events if line.get("event") == "run started"] == [False, True]


@pytest.mark.usefixtures("same_process")
def test_rounds_that_were_finished_are_kept(llama_folder, windows_file, tmp_path, monkeypatch):
    fields = dict(unit="head,channel", ratio=0.5, steps=3, calibration=str(windows_file))
    secateur.prune(str(llama_folder), tmp_path / "straight", **fields)
    for name, owner, call in (("plan", planning.Planner, 2), ("plan", planning.Planner, 3), ("_realised", stepping, 2)):
        out = tmp_path / f"{name}{call}"
        with dying_at(monkeypatch, owner, name, call, Died()):
            secateur.prune(str(llama_folder), out, **fields)
        planned = []
        with monkeypatch.context() as patched:
            original = planning.Planner.plan
            patched.setattr(planning.Planner, "plan", lambda self, o=original, p=planned: p.append(1) or o(self))
            secateur.prune(str(llama_folder), out, **fields)
        assert len(planned) == (2 if call == 2 and name == "plan" else 1)
        assert different(tmp_path / "straight", out) == []


@pytest.mark.usefixtures("same_process")
def test_a_round_whose_model_was_torn_is_written_again(llama_folder, windows_file, tmp_path, monkeypatch):
    fields = dict(unit="channel", ratio=0.5, steps=2, calibration=str(windows_file))
    secateur.prune(str(llama_folder), tmp_path / "straight", **fields)
    with dying_at(monkeypatch, planning.Planner, "plan", 2, Died()):
        secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    (torn,) = (tmp_path / "out.partial" / "scratch").glob("round-*/model/model.safetensors")
    torn.write_bytes(torn.read_bytes()[:-100])
    secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    assert different(tmp_path / "straight", tmp_path / "out") == []


@pytest.fixture
def unfinished(llama_folder, windows_file, tmp_path, monkeypatch, same_process):
    """A run with ratio 0.5 and seed 1 that died while it was writing."""
    fields = dict(unit="weight", criterion="wanda", ratio=0.5, seed=1, calibration=str(windows_file))
    with dying_at(monkeypatch, ShardWriter, "write", 2, Died()):
        secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    return fields


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"ratio": 0.3}, "with --ratio 0.5, and this one says 0.3; give another --out, --overwrite to start over"),
        ({"ratio": 0.3, "seed": 2}, "with --ratio 0.5 and --seed 1, and this one says 0.3 and 2;"),
        ({"unit": "channel"}, "with --unit weight, and this one says channel;"),
        ({"blocks": "1:2"}, "with --blocks nothing, and this one says 1:2;"),
        ({"evaluate_on": "python-docs"}, "with --evaluate nothing, and this one says python-docs,"),
    ],
)
def test_another_run_is_refused_by_its_difference(
    change, difference, unfinished, llama_folder, tmp_path, monkeypatch, windows_file
):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(run, "text_windows", lambda *arguments, **options: None)
    with pytest.raises(OutputError) as error:
        secateur.prune(str(llama_folder), tmp_path / "out", **(unfinished | change))
    assert difference in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'out.partial'} holds an unfinished run")
    assert sorted(tmp_path.rglob("*")) == before
    secateur.prune(str(llama_folder), tmp_path / "out", **unfinished)


def test_overwrite_starts_over(unfinished, llama_folder, tmp_path):
    result = secateur.prune(str(llama_folder), tmp_path / "out", **(unfinished | {"ratio": 0.3}), overwrite=True)
    assert len(result.record["attempts"]) == 1


def test_more_memory_or_less_is_the_same_run(unfinished, llama_folder, tmp_path):
    result = secateur.prune(str(llama_folder), tmp_path / "out", **unfinished, memory="1MiB")
    assert len(result.record["attempts"]) == 2


def test_another_content_of_the_text_is_another_run(unfinished, llama_folder, tmp_path, windows_file):
    from safetensors.torch import save_file

    save_file({"input_ids": torch.ones(6, 24, dtype=torch.int64)}, windows_file)
    with pytest.raises(OutputError, match="a calibration text of the digest"):
        secateur.prune(str(llama_folder), tmp_path / "out", **unfinished)


def test_other_code_is_refused(unfinished, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "source_digest", lambda: "f" * 64)
    with pytest.raises(
        OutputError, match=r"source files of Secateur that have the digest \w{12}, and this one says f{12};"
    ):
        secateur.prune(str(llama_folder), tmp_path / "out", **unfinished)


def test_apply_is_not_prune(unfinished, llama_folder, tmp_path):
    secateur.plan(str(llama_folder), tmp_path / "p.json", **unfinished)
    with pytest.raises(OutputError, match="with the command prune, and this one says apply;"):
        secateur.apply(tmp_path / "p.json", tmp_path / "out")


def change_settings(folder: Path, **fields) -> None:
    file = folder / resuming.STARTED
    content = json.loads(file.read_text())
    content["settings"] |= fields
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("field", ["torch", "transformers", "device", "processor", "capability"])
def test_what_cannot_be_made_the_same_is_refused(field, unfinished, llama_folder, tmp_path):
    change_settings(tmp_path / "out.partial", **{field: "another"})
    with pytest.raises(OutputError, match=r"another, and this one says .*, where sums could differ; finish it where"):
        secateur.prune(str(llama_folder), tmp_path / "out", **unfinished)


def test_the_recorded_threads_are_used_and_given_back(unfinished, llama_folder, tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    change_settings(tmp_path / "out.partial", threads=before + 2)
    original = Realisation.verify

    def verify(self, folder):
        seen.append(torch.get_num_threads())
        return original(self, folder)

    monkeypatch.setattr(Realisation, "verify", verify)
    secateur.prune(str(llama_folder), tmp_path / "out", **unfinished)
    assert seen == [before + 2]
    assert torch.get_num_threads() == before


def test_another_number_of_workers_has_to_be_asked_for(unfinished, llama_folder, windows_file, tmp_path, command):
    change_settings(tmp_path / "out.partial", workers=2)
    words = ["prune", llama_folder, "--out", tmp_path / "out", "--calibration", windows_file, "--unit", "weight"]
    words += ["--criterion", "wanda", "--ratio", 0.5, "--seed", 1]
    code, _, err = command(*words)
    assert code == 2
    assert "with 2 workers, and this one has 1; give as many, or --other-workers" in err
    code, _, err = command(*words, "--other-workers")
    assert code == 0
    assert "one worker instead of 2: sums may differ" in err


def test_a_folder_killed_in_its_first_instant_starts_over(unfinished, llama_folder, tmp_path):
    (tmp_path / "out.partial" / resuming.STARTED).unlink()
    result = secateur.prune(str(llama_folder), tmp_path / "out", **(unfinished | {"ratio": 0.3}))
    assert len(result.record["attempts"]) == 1


def test_a_bad_recipe_leaves_nothing_of_a_resumed_run_but_full_memory_does(
    unfinished, llama_folder, tmp_path, monkeypatch
):
    away, defect = CalibrationError("the network is away"), RuntimeError("allocate memory")
    for error, stays in ((MemoryError(), True), (defect, True), (away, True), (OutputError("no"), False)):
        with dying_at(monkeypatch, Realisation, "verify", 1, error):
            secateur.prune(str(llama_folder), tmp_path / "out", **unfinished)
        assert (tmp_path / "out.partial").exists() == stays


def test_an_interrupted_recovery_is_refused_to_another_and_leaves_no_state(
    llama_folder, windows_file, tmp_path, monkeypatch, same_process
):
    from secateur import recovering

    secateur.prune(str(llama_folder), tmp_path / "cut", unit="channel", criterion="magnitude")
    fields = dict(data=str(windows_file), steps=2)
    with dying_at(monkeypatch, recovering, "write_manifest", 1, Died()):
        secateur.recover(tmp_path / "cut", tmp_path / "tuned", **fields)
    (tmp_path / "tuned.partial" / "secateur" / "stale").touch()
    with pytest.raises(OutputError, match="steps 2, and this one says 3"):
        secateur.recover(tmp_path / "cut", tmp_path / "tuned", data=str(windows_file), steps=3)
    result = secateur.recover(tmp_path / "cut", tmp_path / "tuned", **fields)
    assert len(result.record["attempts"]) == 2
    assert not (tmp_path / "tuned" / "secateur" / "stale").exists()
    assert not (tmp_path / "tuned" / "scratch").exists()
    assert not (tmp_path / "tuned.partial").exists()


# -- full disks


@pytest.mark.parametrize("point", ["a block's scores", "writing a block", "the record"])
def test_a_full_disk_says_that_the_same_command_goes_on(
    point, llama_folder, windows_file, tmp_path, monkeypatch, command, same_process
):
    owner, name, call = POINTS[point]
    words = ["prune", llama_folder, "--calibration", windows_file, *RECIPES["taylor channels"]]
    assert command(*words, "--out", tmp_path / "straight")[0] == 0
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "other-cache"))
    with monkeypatch.context() as patched:
        raising_at(patched, owner, name, call, OSError(errno.ENOSPC, "No space left on device"))
        code, out, err = command(*words, "--out", tmp_path / "out")
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("secateur: the disk filled up")
    assert last.endswith(f"kept in {tmp_path / 'out.partial'}, and the same command goes on from there")
    assert "Traceback" not in err
    assert command(*words, "--out", tmp_path / "out")[0] == 0
    assert different(tmp_path / "straight", tmp_path / "out") == []


def test_a_log_that_cannot_be_written_stops_nothing(llama_folder, tmp_path, monkeypatch, capsys, same_process):
    import logging

    def full(self, record):
        self.handleError(record)

    monkeypatch.setattr(logging.FileHandler, "emit", full)
    secateur.prune(str(llama_folder), tmp_path / "out", unit="weight", criterion="magnitude")
    assert "Logging error" not in capsys.readouterr().err


# -- the last steps


def test_a_run_killed_between_its_two_renames(llama_folder, tmp_path, monkeypatch, same_process):
    fields = dict(unit="weight", criterion="magnitude")
    secateur.prune(str(llama_folder), tmp_path / "out", ratio=0.3, **fields)
    secateur.prune(str(llama_folder), tmp_path / "straight", ratio=0.4, overwrite=True, **fields)
    original, calls = os.replace, []

    def replace(source, target):
        if Path(target) == tmp_path / "out":
            calls.append(1)
            raise Died
        original(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(Died):
            secateur.prune(str(llama_folder), tmp_path / "out", ratio=0.4, overwrite=True, **fields)
    assert calls
    assert not (tmp_path / "out").exists()
    assert secateur.prune(str(llama_folder), tmp_path / "out", ratio=0.4, overwrite=True, **fields).complete_before
    assert different(tmp_path / "straight", tmp_path / "out") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "straight"]


def test_a_run_begun_with_overwrite_goes_on_with_it(llama_folder, windows_file, tmp_path, monkeypatch, same_process):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    fields = dict(unit="weight", criterion="wanda", calibration=str(windows_file), overwrite=True)
    with dying_at(monkeypatch, Realisation, "verify", 1, Died()):
        secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    result = secateur.prune(str(llama_folder), tmp_path / "out", **fields)
    assert len(result.record["attempts"]) == 2
    assert not (tmp_path / "out" / "old").exists()


# -- plans


def test_a_plan_goes_on_and_leaves_nothing_in_the_cache(llama_folder, windows_file, tmp_path, monkeypatch):
    fields = dict(unit="head,channel", ratio=0.5, steps=2, calibration=str(windows_file))
    straight = secateur.plan(str(llama_folder), tmp_path / "straight.json", **fields)
    for error, call in ((Died(), 2), (ResourceError("full"), 1)):  # the first attempt has finished the first round
        with dying_at(monkeypatch, planning.Planner, "plan", call, error):
            secateur.plan(str(llama_folder), tmp_path / "p.json", **fields)
        planned = list((tmp_path / "cache" / "unfinished").glob("*/scratch/round-1/plan.json"))
        assert len(planned) == 1
    assert secateur.plan(str(llama_folder), tmp_path / "p.json", **fields).model_dump() == straight.model_dump()
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "straight.json").read_bytes()
    assert not (tmp_path / "cache" / "unfinished").exists()


@pytest.mark.parametrize("out", ["p.json", "folder"])
def test_a_plan_killed_while_it_was_saved(out, llama_folder, tmp_path, monkeypatch):
    from secateur import plans

    fields = dict(unit="weight", criterion="magnitude")
    for call in (1, 2):  # before the masks, before the plan
        target = tmp_path / str(call) / out
        file = target if out.endswith(".json") else target / "plan.json"
        original, calls = plans.atomic_file, []

        def torn(path, f=file, o=original, n=call, c=calls):
            if path.parent == f.parent:
                c.append(1)
                if len(c) == n:
                    (f.parent / f".{path.name}.abcd1234").parent.mkdir(parents=True, exist_ok=True)
                    (f.parent / f".{path.name}.abcd1234").touch()
                    raise Died
            return o(path)

        with monkeypatch.context() as patched:
            patched.setattr(plans, "atomic_file", torn)
            with pytest.raises(Died):
                secateur.plan(str(llama_folder), target, **fields)
        secateur.plan(str(llama_folder), target, **fields)
        assert not [path for path in file.parent.iterdir() if path.name.startswith(".")]
        assert plans.load_plan(file).masks(1)


def test_a_user_error_leaves_no_unfinished_plan(llama_folder, windows_file, tmp_path):
    with pytest.raises(secateur.errors.RecipeError):
        secateur.plan(str(llama_folder), unit="channel", ratio=0.001, calibration=str(windows_file))
    assert not (tmp_path / "cache" / "unfinished").exists()


def test_unfinished_plans_are_nobodys_after_a_week(tmp_path):
    old, new, held = (tmp_path / "unfinished" / name for name in ("old", "new", "held"))
    ancient = time.time() - 8 * 24 * 3600
    for place in (old, new, held):
        place.mkdir(parents=True)
        (place / ".lock").touch()
        (place / "x").touch()
    for file in (old / "x", old / ".lock", held / "x", held / ".lock"):
        os.utime(file, (ancient, ancient))
    lock = FolderLock(held / ".lock")
    assert lock.acquire()
    runfolder.trim_unfinished(tmp_path / "unfinished")
    lock.release()
    assert sorted(place.name for place in (tmp_path / "unfinished").iterdir()) == ["held", "new"]


def test_what_killed_processes_left_in_the_cache_goes(tmp_path):
    from secateur.blockstore import trim_cache

    old, new = (tmp_path / "scores" / "x" / f".block-0001.safetensors.{name}" for name in ("aaaaaaaa", "bbbbbbbb"))
    old.parent.mkdir(parents=True)
    for file in (old, new):
        file.touch()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    trim_cache(tmp_path)
    assert not old.exists()
    assert new.exists()


# -- the lock

HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from secateur.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.acquire()
if sys.argv[2] == "fork":
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
if sys.argv[2] == "start":
    subprocess.Popen(["sleep", "20"], stdout=subprocess.DEVNULL)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("child", ["none", "fork", "start"])
def test_the_lock_dies_with_its_holder(child, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock"), child], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    lock = FolderLock(tmp_path / ".lock")
    assert not lock.acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    until = time.monotonic() + 10  # a child that was just born has yet to close its copy
    while not lock.acquire():
        assert time.monotonic() < until, "the lock outlives its holder"
        time.sleep(0.01)
    assert not FolderLock(tmp_path / ".lock").acquire()
    lock.release()


def test_a_lock_on_a_folder_that_is_gone_is_none(tmp_path):
    assert not FolderLock(tmp_path / "gone" / ".lock").acquire()


# -- how far it came


def test_how_far_a_run_came_in_words(tmp_path):
    def touch(place: str, age: int) -> None:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
        os.utime(tmp_path / place, (1000 - age, 1000 - age))

    def words() -> str:
        return resuming.read_progress(tmp_path).in_words()

    assert words() == ""
    resuming.note_finished(tmp_path, 3, 12)
    assert words() == "3 of 12 blocks were finished"
    os.utime(tmp_path / "finished.json", (900, 900))
    touch("round-1/plan.json", 50)
    assert words() == "1 round was finished"
    resuming.note_finished(tmp_path / "round-2", 0, 12)
    assert words() == "1 round and 0 of 12 blocks were finished"
    os.utime(tmp_path / "round-2" / "finished.json", (960, 960))
    touch("round-2/plan.json", 30)
    assert words() == "2 rounds were finished"
    touch("decision/plan.json", 20)
    assert words() == "what leaves was decided"
    resuming.note_finished(tmp_path, 5, 12)
    assert words() == "what leaves was decided, and 5 of 12 blocks were finished"
    (tmp_path / "finished.json").write_text("torn")
    assert words() == "what leaves was decided"


# -- differences


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({}, {}, []),
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1}, {"a": 2}, [("a", 1, 2)]),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, [("a.b.c", 1, 2)]),
        ({"a": {"b": 1}}, {"a": 1}, [("a", {"b": 1}, 1)]),
        ({"a": 1}, {"b": 2}, [("a", 1, None), ("b", None, 2)]),
        ({"a": [1, 2]}, {"a": [1, 3]}, [("a", [1, 2], [1, 3])]),
        ({"a": None}, {}, []),
    ],
)
def test_differences_field_by_field(before, now, found):
    assert resuming.differences(before, now) == [resuming.Difference(*item) for item in found]


def test_what_follows_from_another_difference_is_not_said():
    before = {"recipe": {"model": "a", "ratio": 0.5}, "model": "0" * 64}
    now = {"recipe": {"model": "b", "ratio": 0.5}, "model": "1" * 64}
    assert resuming.in_words(resuming.differences(before, now)) == "--model a, and this one says b"


# -- killed for good


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["gblm weight, pruned", "taylor head,channel in two rounds", "sparsegpt weight, each block its own share"]
)
def test_killed_at_a_random_moment(recipe, save, tmp_path, windows_file):
    """The short form of ``benchmarks/kills.py``."""
    folder = save(tiny_llama(num_hidden_layers=6))
    words = [
        sys.executable,
        "-m",
        "secateur",
        "prune",
        str(folder),
        "--calibration",
        str(windows_file),
        *RECIPES[recipe],
    ]

    def go(out: Path, cache: str, kill_after: float | None = None) -> subprocess.CompletedProcess:
        environment = os.environ | {"SECATEUR_CACHE": str(tmp_path / cache), "OMP_NUM_THREADS": "1"}
        try:
            return subprocess.run(
                [*words, "--out", str(out)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=kill_after,
                check=False,
            )  # run() kills with SIGKILL when the time is over
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, -signal.SIGKILL)

    began = time.monotonic()
    assert go(tmp_path / "straight", "cache").returncode == 0
    duration = time.monotonic() - began
    chance = random.Random(recipe)
    for number in range(2):
        out = tmp_path / f"out{number}"
        for _ in range(number + 1):
            go(out, f"cache{number}", chance.uniform(0.3, 1) * duration)
        finished = go(out, f"cache{number}")
        assert finished.returncode == 0, finished.stderr
        assert different(tmp_path / "straight", out) == []
        assert not out.with_name(f"{out.name}.partial").exists()
        shutil.rmtree(out)
