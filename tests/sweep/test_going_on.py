"""A sweep that is killed goes on after the last block that was visited, and gives the same bits."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama

from secateur.checkpoint.reader import open_checkpoint
from secateur.statistics import GradientMean, GradientSquare, InputNorm, InputSecondMoment
from secateur.sweep import Sweep, SweepSettings, boundary
from secateur.sweep.boundary import BoundaryStore

BLOCKS = 6


class KilledError(Exception):
    pass


@pytest.fixture
def deep_folder(save):
    return save(tiny_llama(num_hidden_layers=BLOCKS))


def walk(folder, ids_NT, scratch, needs, pruned=False, memory=0, stop_at=None, blocks=range(BLOCKS), done=None):
    """Statistics by block, and the blocks that were run; dies in the visit of ``stop_at``, after its result is out."""
    found, visited = {}, []

    def visit(index, block, statistics):
        visited.append(index)
        found[index] = {
            (name, kind): s.state()["total"].clone() for name, kinds in statistics.items() for kind, s in kinds.items()
        }
        if index == stop_at:
            raise KilledError
        if pruned:
            return {name: p * 0.5 for name, p in block.named_parameters() if "mlp" in name}
        return None

    sweep = Sweep(open_checkpoint(str(folder)), ids_NT, SweepSettings(2, memory, scratch))
    try:
        if pruned:
            sweep.pruned(needs, blocks, visit, done)
        else:
            sweep.dense(needs, blocks, visit)
    except KilledError:
        pass
    return found, visited


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[b][key], right[b][key]) for b in left for key in left[b]
    )


BACKWARD = frozenset({GradientMean, GradientSquare, InputNorm, InputSecondMoment})


@pytest.mark.parametrize("memory", [0, 40_000, 1 << 30])
@pytest.mark.parametrize("stop_at", [5, 3, 0])
def test_backward_goes_on(deep_folder, windows_NT, tmp_path, stop_at, memory, monkeypatch):
    monkeypatch.setattr(boundary, "COMMIT_SHARE", 1e9)  # every boundary is made safe, however fast the blocks are
    whole, _ = walk(deep_folder, windows_NT, tmp_path / "whole", BACKWARD, memory=memory)
    first, _ = walk(deep_folder, windows_NT, tmp_path / "s", BACKWARD, memory=memory, stop_at=stop_at)
    finished = {index: found for index, found in first.items() if index > stop_at}
    rest, visited = walk(
        deep_folder, windows_NT, tmp_path / "s", BACKWARD, memory=memory, blocks=range(min(finished, default=BLOCKS))
    )
    assert visited == list(reversed(range(stop_at + 1)))
    assert same(finished | rest, whole)
    assert not list((tmp_path / "s").rglob("*.*"))


def test_backward_goes_on_without_running_blocks_again(deep_folder, windows_NT, tmp_path, monkeypatch):
    """After two of six blocks were visited on the way back, nothing but the way back from there is left to do."""
    from secateur.sweep.entrance import BlockCalls

    monkeypatch.setattr(boundary, "COMMIT_SHARE", 1e9)
    walk(deep_folder, windows_NT, tmp_path / "s", BACKWARD, stop_at=3)
    ran = []
    original = BlockCalls.run
    monkeypatch.setattr(BlockCalls, "run", lambda self, block, i, *a: (ran.append(i), original(self, block, i, *a))[1])
    walk(deep_folder, windows_NT, tmp_path / "s", BACKWARD, blocks=range(4))
    assert ran == [i for i in (3, 2, 1, 0) for _ in range(3)]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("stop_at", [0, 2, 5])
def test_forward_goes_on(deep_folder, windows_NT, tmp_path, pruned, stop_at, monkeypatch):
    monkeypatch.setattr(boundary, "COMMIT_SHARE", 1e9)
    needs = frozenset({InputNorm})
    whole, _ = walk(deep_folder, windows_NT, tmp_path / "whole", needs, pruned)
    first, _ = walk(deep_folder, windows_NT, tmp_path / "s", needs, pruned, stop_at=stop_at)
    finished = {index: found for index, found in first.items() if index < stop_at}
    blocks = range(BLOCKS) if pruned else range(stop_at, BLOCKS)
    rest, visited = walk(deep_folder, windows_NT, tmp_path / "s", needs, pruned, blocks=blocks, done=stop_at)
    assert visited == list(range(stop_at, BLOCKS))
    assert same(finished | rest, whole)
    assert not list((tmp_path / "s").rglob("*.*"))


def test_without_commits_everything_is_done_again(deep_folder, windows_NT, tmp_path, monkeypatch):
    """Fast blocks are not worth making safe; what is lost is computed again, to the same bits."""
    monkeypatch.setattr(boundary.Committing, "due", lambda self: False)
    whole, _ = walk(deep_folder, windows_NT, tmp_path / "whole", BACKWARD)
    first, _ = walk(deep_folder, windows_NT, tmp_path / "s", BACKWARD, stop_at=3)
    rest, visited = walk(deep_folder, windows_NT, tmp_path / "s", BACKWARD, blocks=range(4))
    assert visited == [3, 2, 1, 0]
    assert same({5: first[5], 4: first[4]} | rest, whole)


@pytest.mark.parametrize("damage", ["bytes", "mark", "list", "short", "missing"])
@pytest.mark.parametrize("way", ["backward", "pruned"])
def test_damage_between_blocks_is_computed_again(deep_folder, windows_NT, tmp_path, monkeypatch, way, damage):
    monkeypatch.setattr(boundary, "COMMIT_SHARE", 1e9)
    pruned, needs = way == "pruned", frozenset({InputNorm}) if way == "pruned" else BACKWARD
    whole, _ = walk(deep_folder, windows_NT, tmp_path / "whole", needs, pruned)
    first, _ = walk(deep_folder, windows_NT, tmp_path / "s", needs, pruned, stop_at=3)
    for mark in (tmp_path / "s").rglob("boundary-*.json"):
        data = mark.with_suffix(".bin")
        content = data.read_bytes()
        match damage:
            case "bytes":
                middle = len(content) // 2
                data.write_bytes(content[:middle] + bytes(4) + content[middle + 4 :])
            case "mark":
                mark.write_text("{garbage")
            case "list":
                mark.write_text("[1, 2]")
            case "short":
                data.write_bytes(content[:-7])
            case "missing":
                data.unlink()
    finished = {i: found for i, found in first.items() if (i < 3 if pruned else i > 3)}
    blocks = range(BLOCKS) if pruned else range(4)
    rest, _ = walk(deep_folder, windows_NT, tmp_path / "s", needs, pruned, blocks=blocks, done=3)
    assert same(finished | rest, whole)


def test_a_store_is_found_again_and_keeps_bits_and_dtypes(tmp_path):
    tensors = {batch: torch.randn(2, 3, 5).to(dtype) for batch, dtype in enumerate([torch.float32, torch.bfloat16])}
    store = BoundaryStore(0, tmp_path / "s")
    for batch, tensor in tensors.items():
        store.put((4, batch), tensor)
    store.put((5, 0), tensors[0])
    store.commit(4)
    store.close()
    again = BoundaryStore(1 << 20, tmp_path / "s")
    assert again.committed() == {4}
    for _ in range(2):
        for batch, found in again.stream(4, range(2), lambda tensor: tensor):
            assert torch.equal(found, tensors[batch])
            assert found.dtype == tensors[batch].dtype
    again.drop(lambda boundary: True)
    assert BoundaryStore(0, tmp_path / "s").committed() == set()


def test_what_is_held_counts_once(tmp_path):
    store = BoundaryStore(2 * 4 * 10, tmp_path / "s")
    for batch in range(3):
        store.put((0, batch), torch.full((10,), float(batch)))
    assert store.budget.held == 80, "two fit, one is on disk"
    assert [float(x[0]) for _, x in store.stream(0, range(3), lambda t: t, keep=True)] == [0, 1, 2]
    assert store.budget.held == 80
    assert [float(x[0]) for _, x in store.stream(0, range(3), lambda t: t)] == [0, 1, 2]
    assert store.budget.held == 0
    store.clear()
