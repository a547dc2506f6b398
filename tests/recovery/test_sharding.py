"""Two processes that share out weights train as one does, hold half of the blocks each, and leave a plain model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_recovery import same_bits
from two_that_share import CASES, STEPS, in_16_bits, recovered

from secateur.recovery.sharding import clip, hidden_from_accelerate
from secateur.workers import ALONE, USE_FSDP

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What each of the two found."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_that_share.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", USE_FSDP: "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(found: dict, wanted: dict, tolerance: float = 1e-5) -> None:
    assert found["log"]["losses"] == pytest.approx(wanted["log"]["losses"], rel=tolerance)
    looks, expected = ([loss for _, loss in one["log"]["looks"]] for one in (found, wanted))
    assert looks == pytest.approx(expected, rel=tolerance)
    for name in ("held_out_before", "held_out_after"):
        assert found["log"][name] == pytest.approx(wanted["log"][name], rel=tolerance)
    for name in ("trainable_parameters", "kept_step", "notes", "removed"):
        assert found["log"][name] == wanted["log"][name]
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=tolerance, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_that_share_train_as_one(case, two):
    one = recovered(case)
    for worker in two:
        assert_same(worker[case], one)
        assert worker[case]["plain"]
        for name, weight in one["weights"].items():
            assert torch.equal(worker[case]["weights"][name] == 0, weight == 0)
            assert same_bits(worker[case]["weights"][name], two[0][case]["weights"][name])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_holds_half_of_the_blocks_while_it_trains(case, two):
    shared, held = zip(*(worker[case]["parts"] for worker in two), strict=True)
    assert shared == (1.0, 1.0)
    assert sum(held) == pytest.approx(1)
    assert all(0.4 < part < 0.6 for part in held)


@pytest.mark.slow
def test_gradients_are_those_of_one_whatever_the_family(two):
    for worker in two:
        assert len(worker["families"]) > 20
        assert {family: wrong for family, wrong in worker["families"].items() if wrong} == {}


@pytest.mark.slow
def test_experts_that_one_worker_alone_reaches_have_gradients_of_their_own(two):
    for worker in two:
        assert worker["experts"] == []
        *some, none = worker["copies"]
        assert none is None
        assert [gradient.tolist() for gradient in some] == [[4.0, 4.0], [2.5, 2.5], [3.0, 3.0]]


@pytest.mark.slow
def test_a_model_in_16_bits_gets_its_own_dtype_back(two):
    one = recovered("full, half", dtype=torch.bfloat16)
    for worker in two:
        assert worker["bf16"]["plain"]
        assert_same(worker["bf16"], one, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "lora, dense", "full, half", "spp"])
def test_no_block_is_kept_whole_between_the_passes_where_products_are_in_16_bits(case, two):
    """Autocast would keep a copy of every weight, so blocks are gathered in 16 bits instead."""
    one = in_16_bits(case)
    assert one["kept"] > 0
    for worker in two:
        found = worker["products"][case]
        assert found["kept"] == 0
        assert found["plain"]
        assert found["log"]["losses"] == pytest.approx(one["log"]["losses"], abs=0.02)
        assert found["log"]["losses"] != two[0][case]["log"]["losses"]
        assert found["log"]["held_out_before"] == pytest.approx(one["log"]["held_out_before"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full, half", "lora", "lora-prune"])
def test_interrupted_it_ends_with_the_same_bits(case, two):
    for worker in two:
        straight, died, again = worker[case], *(worker[f"{case}, interrupted"][name] for name in ("died", "again"))
        assert died["died"]
        assert died["plain"]
        assert again["steps"] == list(range(4, STEPS + 1))
        assert again["log"] == straight["log"]
        assert all(same_bits(weight, straight["weights"][name]) for name, weight in again["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer_1.pt", "trained_1.safetensors"])
def test_a_damaged_part_costs_time_alone(file, two):
    for worker in two:
        straight, again = worker["full, half"], worker[file]["again"]
        assert again["steps"] == list(range(1, STEPS + 1))
        assert again["log"] == straight["log"]
        assert all(same_bits(weight, straight["weights"][name]) for name, weight in again["weights"].items())


def test_what_accelerate_would_decide_is_hidden_from_it(monkeypatch):
    asked = {USE_FSDP: "true", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with hidden_from_accelerate():
        assert not asked.keys() & os.environ.keys()
    assert asked.items() <= os.environ.items()


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_is_that_of_torch(most):
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))] for _ in range(2))
    for parameter in (*ours, *theirs):
        parameter.grad = torch.arange(parameter.numel()).float().view_as(parameter)
    norm = clip(ours, most, ALONE)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, most))
    assert all(torch.equal(mine.grad, other.grad) for mine, other in zip(ours, theirs, strict=True))
