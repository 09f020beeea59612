"""Loading and exporting official checkpoints, Meta's dense DiT and the native format."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dit_moe import DiT_models, model_config
from dit_moe.checkpoint import (
    CheckpointError,
    detect_config,
    export_state_dict,
    load_checkpoint,
    load_model,
    save_model,
    save_official,
)
from tests.model.checkpoint_cases import assert_same_bytes, golden_arrays, official_state
from tests.model.util import tiny_model

HEADS = {"tiny_timm": 2, "tiny_flash": None}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", HEADS)
def test_golden_output(name: str, dtype: torch.dtype, tolerance: float) -> None:
    state, arrays, _ = golden_arrays(name)
    model = load_checkpoint(state, num_heads=HEADS[name], dtype=dtype)
    assert not model.training
    with torch.no_grad():
        out = model(arrays["x"].to(dtype), arrays["t"], arrays["y"])
    expected = arrays["eval_out"]
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", HEADS)
def test_golden_config(name: str) -> None:
    state, _, meta = golden_arrays(name)
    config = detect_config(state, num_heads=HEADS[name])
    assert config.qk_norm == meta.pop("flash_layout")
    assert {key: getattr(config, key) for key in meta} == meta
    assert config.num_shared_experts == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_round_trip_keeps_every_bit(name: str, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in golden_arrays(name)[0].items()}
    model = load_checkpoint(state, num_heads=HEADS[name])
    assert {param.dtype for param in model.parameters()} == {dtype}
    exported = export_state_dict(model)
    assert_same_bytes(exported, state)
    assert_same_bytes(export_state_dict(load_checkpoint(exported, num_heads=HEADS[name])), state)


def test_round_trip_keeps_nan_payloads() -> None:
    state = official_state(head_dim=16)
    odd = torch.tensor([0x7FC01234, -0x003FFFFF, -0x80000000, 0x7F800000], dtype=torch.int32).view(torch.float32)
    state["blocks.1.moe.experts.3.up_proj.weight"][0, :4] = odd
    state["pos_embed"][0, 0, :4] = odd
    assert_same_bytes(export_state_dict(load_checkpoint(state)), state)


def test_packing_puts_gate_rows_before_up_rows() -> None:
    state = official_state()
    weights = load_checkpoint(state, num_heads=2).state_dict()
    stem = "blocks.1.moe.experts"
    pairs = [(state[f"{stem}.{e}.gate_proj.weight"], state[f"{stem}.{e}.up_proj.weight"]) for e in range(4)]
    assert torch.equal(weights[f"{stem}.w13"], torch.stack([torch.cat(pair) for pair in pairs]))
    downs = [state[f"{stem}.{e}.down_proj.weight"] for e in range(4)]
    assert torch.equal(weights[f"{stem}.w2"], torch.stack(downs))


@pytest.mark.parametrize("wrapper", [None, "ema", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", "legacy", ".safetensors"])
def test_files(tmp_path: Path, suffix: str, wrapper: str | None) -> None:
    state = official_state(head_dim=16, dtype=torch.float16)
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        if wrapper:
            pytest.skip("safetensors files hold no nested entries")
        save_file(state, path)
    else:
        torch.save({wrapper: state} if wrapper else state, path, _use_new_zipfile_serialization=suffix != "legacy")
    assert_same_bytes(export_state_dict(load_checkpoint(path)), state)
    assert_same_bytes(export_state_dict(load_checkpoint(str(path), verify=False)), state)


def test_training_checkpoint_prefers_ema(tmp_path: Path) -> None:
    """The official training script stores model, ema, optimizer state and an argparse.Namespace."""
    ema, raw = official_state(), official_state()
    path = tmp_path / "0400000.pt"
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2), "step": 3}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"model": raw, "ema": ema, "opt": optimizer, "args": argparse.Namespace(model="S/2")}, path)
    assert_same_bytes(export_state_dict(load_checkpoint(path, num_heads=2)), ema)


def test_parameters_in_the_source_are_copied() -> None:
    state = {key: torch.nn.Parameter(value) for key, value in official_state().items()}
    model = load_checkpoint(state, num_heads=2)
    weight = model.blocks[0].attn.proj.weight
    assert weight.is_leaf and weight.requires_grad and not model.pos_embed.requires_grad
    before = state["blocks.0.attn.proj.weight"].detach().clone()
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(state["blocks.0.attn.proj.weight"], before)


def test_non_contiguous_source() -> None:
    state = official_state()
    turned = {key: value.mT.contiguous().mT if value.ndim == 2 else value for key, value in state.items()}
    assert not turned["blocks.0.moe.experts.0.up_proj.weight"].is_contiguous()
    assert_same_bytes(export_state_dict(load_checkpoint(turned, num_heads=2)), state)


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_dtype_converts(tmp_path: Path, file: str) -> None:
    state = official_state(head_dim=8, dtype=torch.float16)
    save = save_file if file.endswith("safetensors") else torch.save
    save(state, tmp_path / file)
    model = load_checkpoint(tmp_path / file, dtype=torch.bfloat16)
    assert_same_bytes(export_state_dict(model), {key: value.bfloat16() for key, value in state.items()})


def test_mixed_dtypes_are_kept_with_a_warning() -> None:
    state = official_state(dtype=torch.float16)
    state["pos_embed"] = state["pos_embed"].float()
    with pytest.warns(UserWarning, match=r"mixes torch\.float16, torch\.float32"):
        assert_same_bytes(export_state_dict(load_checkpoint(state, num_heads=2)), state)
    assert {param.dtype for param in load_checkpoint(state, 2, dtype=torch.float16).parameters()} == {torch.float16}
    state["blocks.0.moe.experts.1.up_proj.weight"] = state["blocks.0.moe.experts.1.up_proj.weight"].float()
    with pytest.raises(CheckpointError, match=r"mixed dtypes.*blocks\.0\.moe\.experts\.w13"):
        load_checkpoint(state, num_heads=2)


def test_stored_positions_are_loaded_not_recomputed() -> None:
    state = official_state()
    assert torch.equal(load_checkpoint(state, num_heads=2).pos_embed, state["pos_embed"])


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {}),
        ({"depth": 3, "experts": 16, "classes": 7}, {"depth": 3, "num_experts": 16, "num_classes": 7}),
        ({"shared": 0, "out_channels": 4}, {"num_shared_experts": 0, "learn_sigma": False}),
        ({"shared": 1, "ratio": 1.5, "tokens": 36}, {"num_shared_experts": 1, "mlp_ratio": 1.5, "input_size": 12}),
        ({"experts": 1}, {"num_experts": 1, "top_k": 1}),
        ({"head_dim": 8}, {"num_heads": 4, "qk_norm": True}),
    ],
)  # fmt: skip
def test_detection(options: dict[str, int], fields: dict[str, object]) -> None:
    expected = {
        "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "top_k": 2,
        "mlp_ratio": 4.0, "num_experts": 4, "num_shared_experts": 2, "num_classes": 10, "learn_sigma": True,
        "qk_norm": False,
    } | fields  # fmt: skip
    heads = None if "head_dim" in options else 2
    state = official_state(**options)
    got = detect_config(state, heads).to_dict()
    assert {key: got[key] for key in expected} == expected
    assert_same_bytes(export_state_dict(load_checkpoint(state, heads)), state)


@pytest.mark.parametrize("hidden", [1, 7, 29, 57, 58, 85, 107, 113, 115])
def test_any_expert_width_is_detected(hidden: int) -> None:
    """Some quotients of widths, times the width, round down to one less (such as 57 / 44 * 44)."""
    state = official_state(width=44, ratio=(hidden + 0.5) / 44, depth=1, experts=2)
    assert detect_config(state, 2).ffn_hidden_size == hidden


@pytest.mark.parametrize("name", sorted(DiT_models))
def test_presets_are_detected_from_their_own_keys(name: str) -> None:
    """Heads come from the preset of the same width and depth, or from q_norm; nothing is allocated."""
    with torch.device("meta"):
        state = export_state_dict(DiT_models[name]())
    assert any("Wqkv" in key for key in state) == ("MoE-XL" in name or "MoE-G" in name)
    assert detect_config(state) == model_config(name)


def test_heads_that_nothing_tells() -> None:
    state = official_state()
    with pytest.raises(CheckpointError, match="hidden_size 32 and depth 2.*pass num_heads"):
        load_checkpoint(state)
    with pytest.raises(CheckpointError, match="num_heads=4, but q_norm of 8 entries means 4|multiple of num_heads 5"):
        load_checkpoint(state, num_heads=5)
    with pytest.raises(CheckpointError, match="num_heads=2, but q_norm of 8 entries means 4"):
        load_checkpoint(official_state(head_dim=8), num_heads=2)


def test_top_k() -> None:
    state = official_state()
    assert load_checkpoint(state, 2).config.top_k == 2
    assert load_checkpoint(state, 2, top_k=3).blocks[0].moe.gate.top_k == 3
    with pytest.raises(CheckpointError, match="top_k: got 5"):
        load_checkpoint(state, 2, top_k=5)


def test_meta_dense_dit() -> None:
    """Meta's DiT keys go into the dense twin; its output is checked against the formulas of the DiT paper."""
    state = {key: value.double() for key, value in official_state(experts=0).items()}
    model = load_checkpoint(state, num_heads=2)
    assert not model.config.is_moe and model.config.mlp_ratio == 4
    x, t, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.rand(3, dtype=torch.float64), torch.arange(3)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), naive_dense_dit(state, x, t, y, heads=2), rtol=1e-6, atol=1e-9)
    assert_same_bytes(export_state_dict(model), state)


def naive_dense_dit(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int) -> Tensor:
    """The dense DiT as the paper writes it (arXiv 2212.09748, section 3), from a flat state dict."""
    f = torch.nn.functional

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return f.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    h = f.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2).flatten(2).mT
    h = h + state["pos_embed"]
    angles = t.float()[:, None] * torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128) / 128)
    features = torch.cat([angles.cos(), angles.sin()], 1).double()
    c = linear("t_embedder.mlp.2", f.silu(linear("t_embedder.mlp.0", features)))
    c = f.silu(c + state["y_embedder.embedding_table.weight"][y])
    batch, tokens, width = h.shape
    for i in range(2):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{b}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = linear(f"{b}.attn.qkv", modulated(h, shift1, scale1))
        q, k, v = (part.view(batch, tokens, heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        attn = torch.softmax(q @ k.mT / (width // heads) ** 0.5, -1) @ v
        h = h + gate1[:, None] * linear(f"{b}.attn.proj", attn.transpose(1, 2).reshape(batch, tokens, width))
        hidden = f.gelu(linear(f"{b}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * linear(f"{b}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = linear("final_layer.linear", modulated(h, shift, scale)).view(batch, 4, 4, 2, 2, 8)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, 8, 8, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"head_dim": 16}, {"experts": 0}, {"shared": 0}])
def test_native_format(tmp_path: Path, options: dict[str, int], dtype: torch.dtype) -> None:
    state = official_state(**options, dtype=dtype)
    model = load_checkpoint(state, None if "head_dim" in options else 2)
    path = tmp_path / "model.ckpt"
    save_model(model, path)
    for loaded in (load_model(path), load_checkpoint(path)):
        assert loaded.config == model.config and not loaded.training
        assert_same_bytes(loaded.state_dict(), model.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]
    assert load_model(path, dtype=torch.float16).pos_embed.dtype == torch.float16


def test_native_keeps_what_keys_do_not_tell(tmp_path: Path) -> None:
    net = DiT_models["DiT-MoE-S/2-8E2A"](
        hidden_size=32, depth=1, num_heads=4, input_size=8, top_k=3, balance_alpha=0.005, class_dropout_prob=0.2
    )
    save_model(net, tmp_path / "net.safetensors")
    assert load_model(tmp_path / "net.safetensors").config == net.config
    assert load_checkpoint(tmp_path / "net.safetensors", top_k=1).config.top_k == 1


def test_native_with_a_gelu_shared_expert(tmp_path: Path) -> None:
    model = tiny_model(shared_expert="gelu", num_shared_experts=3, mlp_ratio=2.5)
    path = tmp_path / "gelu.safetensors"
    save_model(model, path)
    for loaded in (load_model(path), load_checkpoint(path)):
        assert loaded.config == model.config
        assert_same_bytes(loaded.state_dict(), model.state_dict())
    again = load_checkpoint(model.state_dict(), num_heads=2)
    assert again.config.shared_expert == "gelu" and again.config.shared_hidden_size == 80
    assert_same_bytes(again.state_dict(), model.state_dict())


def test_a_gelu_shared_expert_has_no_official_keys(tmp_path: Path) -> None:
    model = tiny_model(shared_expert="gelu")
    with pytest.raises(ValueError, match="shared_expert: got 'gelu', expected 'swiglu'"):
        export_state_dict(model)
    with pytest.raises(ValueError, match="shared_expert"):
        save_official(model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())
    dense = tiny_model(num_experts=0, shared_expert="gelu")  # which ignores the field
    assert_same_bytes(load_checkpoint(export_state_dict(dense), num_heads=2).state_dict(), dense.state_dict())


def test_native_mapping_is_detected() -> None:
    model = load_checkpoint(official_state(head_dim=8))
    again = load_checkpoint(model.state_dict())
    assert again.config == model.config
    assert_same_bytes(again.state_dict(), model.state_dict())


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_checkpoint(official_state(), 2)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def full_disk(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(model, path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("file", ["out.pt", "out.safetensors"])
def test_save_official(tmp_path: Path, file: str) -> None:
    state = official_state(head_dim=16, dtype=torch.bfloat16)
    save_official(load_checkpoint(state), tmp_path / file)
    assert_same_bytes(export_state_dict(load_checkpoint(tmp_path / file)), state)
    if file.endswith(".pt"):
        assert_same_bytes(torch.load(tmp_path / file, weights_only=True), state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_straight_to_the_gpu(tmp_path: Path, dtype: torch.dtype | None) -> None:
    state = official_state(width=64, experts=8, head_dim=16, dtype=torch.float16)
    torch.save({"ema": state}, tmp_path / "model.pt")
    model = load_checkpoint(tmp_path / "model.pt", device="cuda", dtype=dtype)
    assert all(param.is_cuda for param in model.parameters())
    exported = {key: value.cpu() for key, value in export_state_dict(model).items()}
    assert_same_bytes(exported, {key: value.to(dtype or torch.float16) for key, value in state.items()})
    save_model(model, tmp_path / "native.safetensors")
    assert_same_bytes(load_model(tmp_path / "native.safetensors").cpu().state_dict(), model.cpu().state_dict())


MEASURE = """
import sys, threading, time, pathlib, re
import torch
import dit_moe.checkpoint as checkpoint

def status(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", text)[1]) * 1024

peaks, done = {"RssAnon": 0, "RssFile": 0}, threading.Event()
def watch():
    while not done.is_set():
        for field in peaks:
            peaks[field] = max(peaks[field], status(field))
        time.sleep(0.002)

checkpoint.load_checkpoint(sys.argv[2])  # imports and first-use allocations are not the checkpoint's
before = {field: status(field) for field in peaks} | {"VmRSS": status("VmRSS")}
pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present
thread = threading.Thread(target=watch)
thread.start()
model = checkpoint.load_checkpoint(sys.argv[1])
done.set()
thread.join()
print(status("VmHWM") - before["VmRSS"], peaks["RssAnon"] - before["RssAnon"], peaks["RssFile"] - before["RssFile"])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_peak_memory_is_near_one_copy(tmp_path: Path, file: str) -> None:
    """The whole resident set, mapped pages of the file included, grows by less than 1.15 times the file."""
    save = save_file if file.endswith("safetensors") else torch.save
    save(official_state(width=16, depth=1, head_dim=8), tmp_path / f"small_{file}")
    big = official_state(width=384, depth=6, experts=16, head_dim=48, classes=1000, dtype=torch.float16)  # 370 MB
    save(big, tmp_path / file)
    del big
    command = [sys.executable, "-c", MEASURE, tmp_path / file, tmp_path / f"small_{file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_child_environment())
    total, anonymous, mapped = map(int, done.stdout.split())
    size = (tmp_path / file).stat().st_size
    shares = f"peak {total / size:.3f}, anonymous {anonymous / size:.3f}, mapped {mapped / size:.3f}"
    print(f"of {size / 2**20:.0f} MiB: {shares}")
    assert total < 1.15 * size
    assert anonymous > 0.95 * size  # the model itself: the measurement sees what it should
    assert mapped < 0.1 * size


def _child_environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
