"""Writing a folder of weights: the library's own bytes, in any order, and the same bytes after a crash at any moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from tiny_models import tiny_llama

import secateur
from secateur.checkpoint import tensorfile
from secateur.checkpoint import writer as writer_module
from secateur.checkpoint.progress import Progress
from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.tensorfile import TensorFile, TensorSpec
from secateur.checkpoint.writer import ShardWriter
from secateur.plans import load_plan
from secateur.realise import Realisation

SMALL_SHARDS = 60_000
"""Bytes a shard in the tests: a tiny model has several."""


class Crash(BaseException):
    """What no code of ours catches, as no code catches a loss of power."""


def tensors_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "head": torch.randn(7, 3, generator=generator),
        "a.weight": torch.randn(5, 4, generator=generator).bfloat16(),
        "a.bias": torch.randn(4, generator=generator).half(),
        "b.flags": torch.randint(2, (9,), generator=generator).bool(),
        "b.nothing": torch.empty(0, 4),
        "b.number": torch.tensor(3.5),
        "b.weight": torch.randn(4, 4, generator=generator).mT,
        "index": torch.randint(99, (6,), generator=generator),
    }


PIECES = [("head",), ("a.weight", "a.bias"), ("b.flags", "b.nothing", "b.number", "b.weight"), ("index",)]


def specs_of(tensors):
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def write_all(folder, tensors, order=PIECES, shard_bytes=100, **options):
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, specs_of(tensors), shard_bytes, **options) as writer:
        for piece in order:
            if not writer.holds(piece):
                writer.write({name: tensors[name] for name in piece})
        return writer.close()


@pytest.fixture
def whole(tmp_path):
    """The files of a writing that nothing disturbed."""
    write_all(tmp_path / "whole", tensors_of())
    return contents(tmp_path / "whole")


def test_bytes_are_those_of_the_library(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 2, 2)}
    (file,) = write_all(tmp_path / "out", tensors, order=[tuple(tensors)], shard_bytes=10**6)
    assert file.read_bytes() == save(tensors, {"format": "pt"})


@pytest.mark.parametrize("order", [PIECES[::-1], PIECES[2:] + PIECES[:2]])
def test_the_order_of_writing_changes_nothing(order, whole, tmp_path):
    files = write_all(tmp_path / "out", tensors_of(), order)
    assert len(files) > 2
    assert contents(tmp_path / "out") == whole
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of().items())


def test_what_was_not_announced_is_refused(tmp_path):
    tensors = tensors_of()
    with ShardWriter(tmp_path, specs_of(tensors)) as writer:
        for wrong in ({"other": torch.ones(1)}, {"head": torch.ones(3, 7)}, {"head": torch.ones(7, 3).half()}):
            with pytest.raises(ValueError, match=r"expected|not among"):
                writer.write(wrong)
        writer.write({"head": tensors["head"]})
        with pytest.raises(ValueError, match="not every tensor"):
            writer.close()


def test_large_tensors_are_written_in_several_calls(monkeypatch, whole, tmp_path):
    """The system takes at most 2 GiB at once; here it takes seven bytes."""
    monkeypatch.setattr(
        tensorfile.os, "pwrite", lambda handle, data, at, o=tensorfile.os.pwrite: o(handle, data[:7], at)
    )
    write_all(tmp_path / "out", tensors_of())
    assert contents(tmp_path / "out") == whole


def crash_at(monkeypatch, moment):
    """Let the ``moment``-th of the operations that touch the disk not happen, nor anything after it; returns the count."""
    count = [0]

    def counted(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] >= moment:
                raise Crash
            return original(*args, **kwargs)

        return call

    for owner, name in (
        (tensorfile, "_write_at"),
        (TensorFile, "create"),
        (TensorFile, "sync"),
        (Progress, "note"),
        (writer_module.ShardWriter, "_write_index"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return count


def moments(tmp_path):
    """How many such operations a writing without a crash has."""
    with pytest.MonkeyPatch.context() as patch:
        count = crash_at(patch, 10**9)
        write_all(tmp_path / "counted", tensors_of(), work=tmp_path / "counted-work")
    return count[0]


def test_a_crash_at_any_moment_leaves_what_a_second_run_completes(whole, tmp_path):
    number = moments(tmp_path)
    assert number > 20
    for moment in range(1, number + 1):
        folder, work = tmp_path / f"out-{moment}", tmp_path / f"work-{moment}"
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, moment)
            with pytest.raises(Crash):
                write_all(folder, tensors_of(), work=work)
        write_all(folder, tensors_of(), work=work)
        assert contents(folder) == whole, moment


def test_a_piece_is_noted_only_once_its_bytes_are_on_the_disk(monkeypatch, tmp_path):
    done = []
    for owner, name in ((tensorfile, "_write_at"), (TensorFile, "sync"), (Progress, "note")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, o=plain: (o(*a), done.append(n))[0])
    write_all(tmp_path / "out", tensors_of(), work=tmp_path / "work")
    notes = [at for at, name in enumerate(done) if name == "note"]
    assert len(notes) == len(PIECES)
    for before, at in zip([0, *notes], notes, strict=False):
        last_write = max((i for i in range(before, at) if done[i] == "_write_at"), default=before)
        assert "sync" in done[last_write:at]


def test_finished_pieces_are_not_written_again_and_unfinished_bytes_are(whole, tmp_path):
    folder, work, tensors = tmp_path / "out", tmp_path / "work", tensors_of()
    folder.mkdir()
    with ShardWriter(folder, specs_of(tensors), 100, work=work) as writer:
        writer.write({name: tensors[name] for name in PIECES[2]})
    for file in folder.glob("*.safetensors"):  # what a crash may leave where nothing is noted as finished
        with file.open("r+b") as stream:
            for name, tensor in load_file(file).items():
                if name not in PIECES[2] and tensor.numel():
                    place = writer._home[name]._offsets[name]
                    stream.seek(place)
                    stream.write(b"\xaa" * (tensor.numel() * tensor.element_size()))
    written = []
    with ShardWriter(folder, specs_of(tensors), 100, work=work) as writer:
        assert writer.remaining() == sum(s.bytes for s in specs_of(tensors) if s.name not in PIECES[2])
        for piece in PIECES:
            if not writer.holds(piece):
                written.append(piece)
                writer.write({name: tensors[name] for name in piece})
        writer.close()
    assert written == [PIECES[0], PIECES[1], PIECES[3]]
    assert contents(folder) == whole


@pytest.mark.parametrize("damage", ["truncated", "gone", "header", "torn note", "garbage note"])
def test_leftovers_that_were_damaged_are_not_believed(damage, whole, tmp_path):
    folder, work, tensors = tmp_path / "out", tmp_path / "work", tensors_of()
    folder.mkdir()
    with ShardWriter(folder, specs_of(tensors), 100, work=work) as writer:
        for piece in PIECES[:3]:
            writer.write({name: tensors[name] for name in piece})
    first = min(folder.glob("*.safetensors"))
    (note,) = work.glob("written-*/*.jsonl")
    if damage == "truncated":
        first.write_bytes(first.read_bytes()[:-1])
    elif damage == "gone":
        first.unlink()
    elif damage == "header":
        first.write_bytes(first.read_bytes().replace(b"head", b"daeh"))
    elif damage == "torn note":  # the last line was cut off: its piece is written again
        note.write_bytes(note.read_bytes()[:-3])
    else:
        note.write_bytes(b"\0\0\0\0" + note.read_bytes() + b'{"no": "list"}\n"text"\n\xff\xfe\n')
    with ShardWriter(folder, specs_of(tensors), 100, work=work) as writer:
        assert writer.holds(PIECES[1]) == (damage in ("torn note", "garbage note"))
        assert not writer.holds(PIECES[2]) or damage == "garbage note"
    write_all(folder, tensors, work=work)
    assert contents(folder) == whole
    write_all(folder, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, work=work)
    assert contents(folder) == whole, "everything was noted as finished, also after a torn line"


@pytest.mark.parametrize("change", ["shape", "identity", "shards"])
def test_leftovers_of_other_specs_are_not_gone_on_from(change, tmp_path):
    folder, work, tensors = tmp_path / "out", tmp_path / "work", tensors_of()
    write_all(folder, tensors, work=work, identity="one")
    new = tensors_of(seed=1) | ({"head": torch.randn(3, 3)} if change == "shape" else {})
    options = {
        "identity": "two" if change == "identity" else "one",
        "shard_bytes": 10**6 if change == "shards" else 100,
    }
    write_all(folder, new, work=work, **options)
    write_all(tmp_path / "expected", new, shard_bytes=options["shard_bytes"])
    assert contents(folder) == contents(tmp_path / "expected")
    assert len(list(work.glob("written-*"))) == 1


def test_ranks_write_their_shares_each(whole, tmp_path):
    folder, work, tensors = tmp_path / "out", tmp_path / "work", tensors_of()
    folder.mkdir()
    writers = [ShardWriter(folder, specs_of(tensors), 100, work=work, rank=rank) for rank in range(3)]
    for number, piece in enumerate(PIECES):
        writers[number % 3].write({name: tensors[name] for name in piece})
    with pytest.raises(ValueError, match="not every tensor"):
        write_all(tmp_path / "other", tensors, order=PIECES[:2], work=tmp_path / "other-work")
    writers[1].close()
    assert contents(folder) == whole


# -- a plan carried out, interrupted anywhere


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A tiny model in shards, plans that cut and mask it, and the folders that an undisturbed run writes."""
    root = tmp_path_factory.mktemp("pruned")
    tiny_llama(num_hidden_layers=4).to(torch.bfloat16).save_pretrained(root / "model", max_shard_size="100KB")
    for unit in ("channel,head", "weight", "block"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SECATEUR_CACHE", str(root / "cache"))
            secateur.plan(str(root / "model"), root / f"{unit}.json", criterion="magnitude", unit=unit, ratio=0.26)
    return root


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (SMALL_SHARDS,))


def realisation(root, unit):
    return Realisation(open_checkpoint(str(root / "model")), load_plan(root / f"{unit}.json"))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("unit", ["channel,head", "weight", "block"])
def test_a_realisation_goes_on_from_the_last_finished_piece(unit, pruned, tmp_path, monkeypatch):
    ours = realisation(pruned, unit)
    ours.write(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) > 2
    read, original = [], type(ours.checkpoint).read
    monkeypatch.setattr(
        type(ours.checkpoint), "read", lambda self, names: (read.append(n := list(names)), original(self, n))[1]
    )
    pieces = len(list(ours._pieces()))
    for survived in range(pieces + 1):
        folder, work = tmp_path / f"out-{survived}", tmp_path / f"work-{survived}"
        written, plain = [0], ShardWriter.write

        def failing(self, tensors, written=written, survived=survived, plain=plain):
            if written[0] == survived:
                raise Crash
            written[0] += 1
            plain(self, tensors)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardWriter, "write", failing)
            if survived < pieces:
                with pytest.raises(Crash):
                    ours.write(folder, work)
            else:
                ours.write(folder, work)
        read.clear()
        ours.write(folder, work)
        assert len(read) == pieces - survived, "finished pieces are not even read"
        assert contents(folder) == expected


@pytest.mark.usefixtures("small_shards")
def test_shares_come_to_the_same_folder(pruned, tmp_path):
    ours = realisation(pruned, "weight")
    ours.write(tmp_path / "whole")
    for rank in (2, 0, 1):
        ours.write_share(tmp_path / "out", tmp_path / "work", (rank, 3))
        if rank != 1:
            with pytest.raises(ValueError, match="not every tensor"):
                ours.finish(tmp_path / "out", tmp_path / "work")
    ours.finish(tmp_path / "out", tmp_path / "work")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_the_leftovers_of_another_plan_are_written_anew(pruned, tmp_path):
    other = load_plan(pruned / "weight.json")
    masks = other.masks(0)
    plan = load_plan(pruned / "weight.json")
    plan.keep_in(tmp_path / "kept")
    name = next(iter(masks))
    from secateur.removal.decision import BlockDecision

    plan.add(0, BlockDecision(masks=masks | {name: ~masks[name]}))  # the same shapes, other weights
    checkpoint = open_checkpoint(str(pruned / "model"))
    Realisation(checkpoint, other).write(tmp_path / "out", tmp_path / "work")
    Realisation(checkpoint, plan).write(tmp_path / "out", tmp_path / "work")
    Realisation(checkpoint, plan).write(tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


KILLED = """
import os, signal, sys
from pathlib import Path
from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.writer import ShardWriter
from secateur.plans import load_plan
from secateur.realise import Realisation
root, out, work, survive = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
plain, written = ShardWriter.write, []
def write(self, tensors):
    if len(written) == survive:
        for name, tensor in list(tensors.items())[:1]:
            self._home[name].put(name, tensor)
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(1)
    plain(self, tensors)
ShardWriter.write = write
ShardWriter.__init__.__defaults__ = (60_000,)
Realisation(open_checkpoint(str(root / "model")), load_plan(root / "weight.json")).write(out, work)
"""


@pytest.mark.usefixtures("small_shards")
def test_a_killed_process_is_gone_on_from(pruned, tmp_path):
    command = [sys.executable, "-c", KILLED, pruned, tmp_path / "out", tmp_path / "work", "3"]
    killed = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    ours = realisation(pruned, "weight")
    (note,) = (tmp_path / "work").glob("written-*/*.jsonl")
    assert len([json.loads(line) for line in note.read_text().splitlines()]) == 3
    ours.write(tmp_path / "out", tmp_path / "work")
    ours.write(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("part", [16, 100, 1000])
def test_the_content_hash_does_not_depend_on_its_parts(part, pruned, monkeypatch):
    from secateur.checkpoint import reader

    whole = open_checkpoint(str(pruned / "model")).content_hash
    monkeypatch.setattr(reader, "PART_BYTES", part)
    assert open_checkpoint(str(pruned / "model")).content_hash == whole


@pytest.mark.parametrize("row", [0, 95])
def test_a_damaged_number_is_found_in_whatever_part(row, tmp_path, monkeypatch):
    from secateur.checkpoint import reader
    from secateur.errors import ModelError

    monkeypatch.setattr(reader, "PART_BYTES", 1000)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[row, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight.* holds NaN"):
        _ = open_checkpoint(str(tmp_path / "model")).content_hash
