"""Capturing steps, on a stand-in for torch.cuda: the order of calls, what is told of a failure, and the recovery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dit_moe import graphs
from dit_moe.graphs import GraphCapture, NotCapturable, has_hooks


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with the device; a capture whose step fails ends with an error of its own, as CUDA's does."""
    log: list[str] = []

    @contextmanager
    def graph(*args: Any, **options: Any) -> Iterator[None]:
        log.append("capture")
        try:
            yield
        except ValueError:
            raise RuntimeError("operation failed due to a previous error during capture") from None

    def record(name: str) -> Callable[..., None]:
        return lambda *args, **options: log.append(name)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        device=lambda device: nullcontext(), Stream=lambda device: stream, stream=lambda stream: nullcontext(),
        current_stream=lambda device: stream, graph_pool_handle=record("pool"), CUDAGraph=SimpleNamespace, graph=graph,
        get_sync_debug_mode=lambda: 0, set_sync_debug_mode=lambda mode: log.append(f"waits {mode}"),
        synchronize=record("wait"), current_device=lambda: 0,
    )  # fmt: skip
    random = SimpleNamespace(fork_rng=lambda devices: nullcontext())
    fake = SimpleNamespace(cuda=cuda, random=random, zeros=record("kernel"), rand=record("draw"))
    monkeypatch.setattr(graphs, "torch", fake)
    return log


def test_a_step_is_rehearsed_and_captured(log: list[str]) -> None:
    GraphCapture(torch.device("cuda"))(lambda: log.append("step"), lambda: log.append("reset"))
    assert log == ["pool", *"reset step reset".split(), "waits error", "step", "waits 0", "reset", "capture", "step"]


def test_a_step_that_waits_never_gets_to_a_capture(log: list[str]) -> None:
    def step() -> None:
        if log[-1] == "waits error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")

    expected = r"failed \(RuntimeError: called a synchronizing CUDA operation\)"
    with pytest.raises(NotCapturable, match=expected):
        GraphCapture(torch.device("cuda"))(step)
    assert log == ["pool", "waits error", "waits 0"]


def test_a_failed_capture_is_followed_by_a_good_one(log: list[str]) -> None:
    def step() -> None:
        if log[-1] == "capture":
            raise ValueError("not in a graph")

    with pytest.raises(NotCapturable, match=r"failed \(ValueError: not in a graph\)"):
        GraphCapture(torch.device("cuda"))(step)
    assert log[3:] == ["capture", "wait", "pool", "capture", "kernel", "draw"]


def test_hooks_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not has_hooks(model)
    for register in (model[1].register_forward_pre_hook, model[0].register_full_backward_hook):
        handle = register(lambda *args: None)  # type: ignore[operator]
        assert has_hooks(model)
        handle.remove()
    assert not has_hooks(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert has_hooks(model)
    handle.remove()
