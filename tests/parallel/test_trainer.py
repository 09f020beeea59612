"""The trainer on several ranks against itself on one: losses, weights, averages, checkpoints, stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dit_moe_kernels import use_backend

from benchmarks.ranks import run_on_ranks
from dit_moe.runs import RunFolder

from . import trainer_scenarios as scenarios

TRAINED = [
    scenarios.trainer_ddp,
    scenarios.trainer_fsdp,
    scenarios.trainer_ddp_ep2,
    scenarios.trainer_fsdp_ep2,
]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same training in this process, without torch.distributed."""
    with use_backend("reference"):
        return scenarios.trained()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "ranks").mkdir()
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    cases = [
        scenarios.trainer_variants,
        scenarios.trainer_saves,
        scenarios.trainer_resumes,
        scenarios.trainer_least_state,
        scenarios.trainer_stops,
        scenarios.trainer_breaks,
        scenarios.trainer_samples,
    ]
    return run_on_ranks(2, [*TRAINED, *cases], folder / "ranks", timeout=400)


def visible(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the keys' biases, which the softmax cancels: their gradient is rounding, by which Adam moves them."""
    kept = {}
    for name, tensor in state.items():
        if "attn.qkv.bias" in name:
            query, _, value = tensor.chunk(3)
            tensor = torch.cat([query, value])
        kept[name] = tensor
    return kept


def assert_same_training(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for name in ("loss", "balance_loss", "grad_norm"):
        seen, expected = ([report[name] for report in run["reports"]] for run in (ranks[0], alone))
        assert len(seen) == 50
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-5, atol=0, msg=name)
    loads = [[report["expert_load"] for report in run["reports"]] for run in (ranks[0], alone)]
    torch.testing.assert_close(torch.tensor(loads[0]), torch.tensor(loads[1]), rtol=1e-6, atol=0)
    for rank in ranks:
        assert rank["reports"] == ranks[0]["reports"]
    for part, atol in (("state", 2e-5), ("average", 2e-5)):
        seen, expected = visible(ranks[0][part]), visible(alone[part])
        assert seen.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(seen[name], tensor, rtol=1e-3, atol=atol, msg=f"{part} {name}")
    assert ranks[1]["average"] is None


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in TRAINED])
def test_two_ranks_train_as_one(alone, two, scenario):
    assert_same_training(alone, two[scenario])


def test_precision_and_memory_options_on_two_ranks(two):
    for variant, changes in scenarios.VARIANTS.items():
        reports = scenarios.trained(**changes)["reports"]
        expected = torch.tensor([report["loss"] for report in reports])
        # bf16 gradients are averaged over ranks that rounded them apart: a hundredth is four steps of bf16.
        rtol = 1e-2 if "bf16" in variant else 1e-5
        for name in ("ddp", "fsdp", "fsdp_ep2"):
            seen = torch.tensor(two["trainer_variants"][0][name, variant])
            torch.testing.assert_close(seen, expected, rtol=rtol, atol=0, msg=f"{name} {variant}")


def test_resumed_ranks_end_as_unbroken_ones_bit_for_bit(two):
    ends, again = two["trainer_saves"], two["trainer_resumes"]
    for saved, key in (
        ("ddp", ("ddp", "ddp", 1)),
        ("fsdp", ("fsdp", "fsdp", 1)),
        ("fsdp_ep2", ("fsdp_ep2", "fsdp", 2)),
        ("ddp_ep2", ("ddp_ep2", "ddp", 2)),
    ):
        for rank in range(2):
            for name, tensor in ends[rank][saved].items():
                assert torch.equal(tensor, again[rank][key][name]), (saved, name)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_ep2"])
def test_eight_bytes_a_parameter_train_and_resume(alone, two, name):
    """bf16 weights without masters, bf16 moments, averages in the host's memory, as G on two 80 GB GPUs needs."""
    ranks = [results[name] for results in two["trainer_least_state"]]
    expected = [report["loss"] for report in alone["reports"][: scenarios.LEAST_STATE["steps"]]]  # fp32
    # Weights of 8 bits and bf16 products: a hundredth is four roundings of bf16.
    torch.testing.assert_close(torch.tensor(ranks[0]["losses"]), torch.tensor(expected), rtol=1e-2, atol=0)
    for rank in ranks:
        for key, tensor in rank["state"].items():
            assert tensor.isfinite().all() and torch.equal(tensor, rank["again"][key]), key
        held = rank["bytes"]
        per_element = {part: size / held["elements"] for part, size in held.items() if part != "elements"}
        assert per_element == {"weights": 2, "parameters": 2, "gradients": 2, "moments": 4, "averages": 4}
    for key, tensor in ranks[0]["average"].items():
        if key != "pos_embed":
            torch.testing.assert_close(tensor, ranks[0]["state"][f"ema.{key}"], rtol=0, atol=0)


def test_checkpoints_are_read_however_a_run_is_spread(two, folder):
    ends = {key: two["trainer_resumes"][0][key] for key in (("fsdp_ep2", "ddp", 1), ("ddp", "fsdp", 1))}
    run = scenarios.new_trainer(seed=9, steps=12)
    RunFolder(folder / "fsdp_ep2").resume(run)  # two ranks' checkpoint in one process
    assert run.step == 6
    run.run()
    ends["alone"] = scenarios.whole(run)
    unbroken = scenarios.new_trainer(steps=12)
    unbroken.run()
    expected = visible(scenarios.whole(unbroken))
    for end in ends.values():
        for name, tensor in visible(end).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)


def test_only_the_newest_checkpoint_of_the_ranks_stays(two, folder):
    for name in ("ddp", "fsdp", "fsdp_ep2", "ddp_ep2"):
        assert [path.name for path in (folder / name / "checkpoints").iterdir()] == ["step-00000006"]


def test_all_ranks_stop_after_the_same_step(two):
    assert two["trainer_stops"] == [{"step": 4}, {"step": 4}]  # known one step later


def test_broken_numbers_of_one_rank_end_all_with_the_same_message(two):
    seen = two["trainer_breaks"]
    assert seen[0] == seen[1]
    assert "step 3: the loss is no longer finite" in seen[0]["message"] and seen[0]["finite"]


def test_sampling_while_training(two):
    for name in ("ddp", "fsdp", "fsdp_ep2"):
        seen = two["trainer_samples"]
        for rank in range(2):
            torch.testing.assert_close(seen[rank][name, "inside"], seen[0][name, "outside"], rtol=1e-5, atol=1e-6)
    undisturbed = scenarios.new_trainer(steps=8)
    undisturbed.run()
    expected = visible(scenarios.whole(undisturbed))
    for name in ("ddp", "fsdp", "fsdp_ep2"):
        for key, tensor in visible(two["trainer_samples"][0][name, "state"]).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.slow
def test_four_ranks_train_as_one(alone, tmp_path):
    cases = [*TRAINED, scenarios.trainer_saves, scenarios.trainer_resumes]
    (tmp_path / "ranks").mkdir()
    seen = run_on_ranks(4, cases, tmp_path / "ranks", timeout=560)
    for scenario in TRAINED:
        assert_same_training(alone, seen[scenario.__name__])
    for name, tensor in seen["trainer_saves"][0]["fsdp_ep2"].items():
        assert torch.equal(tensor, seen["trainer_resumes"][3]["fsdp_ep2", "fsdp", 2][name]), name
