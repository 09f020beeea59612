"""Damaged, malicious and wrong checkpoints: one clear error each, nothing run, nothing half-loaded."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dit_moe.checkpoint import CheckpointError, load_checkpoint, load_model, save_model, sources
from dit_moe.checkpoint.errors import MAX_LISTED
from tests.model.checkpoint_cases import official_state

State = dict[str, Tensor]


class Bomb:
    """Unpickled without weights_only, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.target, "boom")


class ShellBomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("kind", [Bomb, ShellBomb])
@pytest.mark.parametrize("place", ["whole", "value", "beside", "legacy", "plain pickle"])
def test_pickle_bomb_is_refused(tmp_path: Path, kind: type, place: str) -> None:
    target, path = tmp_path / "boom", tmp_path / "model.pt"
    bomb = kind(target)
    content = {
        "whole": bomb,
        "value": official_state() | {"pos_embed": bomb},
        "beside": {"ema": official_state(), "note": bomb},
    }.get(place, {"ema": official_state(), "note": bomb})
    if place == "plain pickle":
        path.write_bytes(pickle.dumps({"pos_embed": bomb}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(CheckpointError, match="weights_only.*nothing in it was run") as caught:
        load_checkpoint(path, num_heads=2)
    assert not target.exists()
    assert "unsupported" in str(caught.value).lower() and "False" not in str(caught.value)  # no advice to disarm it
    if place == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()  # the bomb was live


@pytest.mark.parametrize("keep", [0, 1, 3, 8, 9, 100, 0.3, 0.9, -1])
@pytest.mark.parametrize("file", ["model.pt", "legacy.pt", "model.safetensors", "native.safetensors"])
def test_truncated_file(tmp_path: Path, file: str, keep: float) -> None:
    path = _written(tmp_path / file)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ""])
@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x02", b"{", b"\x10\0\0\0\0\0\0\0{"])
def test_random_bytes(tmp_path: Path, suffix: str, head: bytes) -> None:
    path = tmp_path / f"model{suffix}"
    noise = torch.randint(256, (4096,), dtype=torch.uint8).numpy().tobytes()
    path.write_bytes(head + noise)
    with pytest.raises(CheckpointError, match="model"):
        load_checkpoint(path)


def test_flipped_bit_in_a_tensor_is_seen(tmp_path: Path) -> None:
    path = _written(tmp_path / "model.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupted: Bad CRC-32 for file .*data"):
        load_checkpoint(path)
    load_checkpoint(path, verify=False)  # what the check is for: without it, the wrong weight is loaded


@pytest.mark.parametrize("file", ["model.pt", "legacy.pt", "model.safetensors", "native.safetensors"])
def test_any_damage_gives_a_checkpoint_error_or_a_whole_model(tmp_path: Path, file: str) -> None:
    """Random bytes changed, most of them where keys, shapes and directories lie; no other error may come out."""
    good = _written(tmp_path / file, width=8, head_dim=4, depth=1, experts=2, tokens=4, classes=2).read_bytes()
    rng = random.Random(file)
    refused = 0
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.choice([1, 2, 5])):
            span = rng.choice([6000, len(data)])
            data[rng.choice([1, -1]) * rng.randrange(1, min(span, len(data)))] = rng.randrange(256)
        (tmp_path / file).write_bytes(data)
        try:
            model = load_checkpoint(tmp_path / file, verify=rng.random() < 0.5)
            assert not any(param.is_meta for param in model.parameters())
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_compressed_zip(tmp_path: Path) -> None:
    path = _written(tmp_path / "model.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        load_checkpoint(packed)


def test_zip_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load_checkpoint(path)


def test_torchscript_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript|no readable|compressed"):
        load_checkpoint(path)


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes(b"{" + b"[" * 5000),
        safetensors_bytes(b'{"pos_embed": 3}'),
        safetensors_bytes({"pos_embed": {"dtype": "F32", "shape": [1, 16, 32], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors_bytes({"pos_embed": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors_bytes({"pos_embed": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4),
        safetensors_bytes({"pos_embed": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        struct.pack("<Q", 2**63) + b"{}",
    ],
)
def test_bad_safetensors_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        load_checkpoint(path)


def test_tensor_larger_than_its_data(tmp_path: Path) -> None:
    """A few bytes on disk that claim a huge tensor would make us allocate it."""
    state = official_state()
    state["y_embedder.embedding_table.weight"] = torch.zeros(1, 32).expand(10**9, 32)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="embedding_table.*claims more data"):
        load_checkpoint(tmp_path / "model.pt", num_heads=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a state dict, got list"),
        ({}, "key 'x_embedder.proj.weight' is missing; keys: none"),
        ({"ema": None}, "entry 'ema': expected a state dict, got NoneType"),
        ({"model": torch.zeros(3)}, "entry 'model': expected a state dict, got Tensor"),
        ({"ema": {"model": {}}}, "entry 'ema' is itself wrapped"),
        ({"ema": {"ema": {"ema": {}}}}, "entry 'ema' is itself wrapped"),
        ({"ema": {}, "pos_embed": torch.zeros(3)}, "tensors lie beside the entry 'ema'"),
        ({"pos_embed": 3.0}, "'pos_embed': expected a tensor, got float"),
        ({"pos_embed": {"a": torch.zeros(2)}}, "'pos_embed': expected a tensor, got dict"),
        ({3: torch.zeros(2)}, "expected strings as keys, got 3"),
        ({"pos_embed": torch.eye(3).to_sparse()}, "expected a dense tensor"),
        ({"pos_embed": torch.zeros(3, device="meta")}, "expected a dense tensor with data"),
        ({"conv.weight": torch.zeros(2)}, "not a DiT or DiT-MoE checkpoint.*keys: conv.weight"),
    ],
)
def test_wrong_content(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.pt")
    if isinstance(content, dict):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(content)


def drop(*keys: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def put(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[State], State]:
    return lambda state: state | {key: torch.zeros(shape, dtype=dtype)}


WRONG_CONFIG = [
    (drop("blocks.1.attn.proj.bias"), "missing keys: blocks.1.attn.proj.bias"),
    (drop("blocks.0.moe.experts.3.up_proj.weight"), "missing keys: blocks.0.moe.experts.3.up_proj.weight"),
    (drop("blocks.0.moe.gate.weight"), "missing keys: blocks.0.moe.gate.weight"),
    (drop("pos_embed"), "'pos_embed' is missing"),
    (put("blocks.0.attn.extra.weight", 3), "unknown keys: blocks.0.attn.extra.weight"),
    (put("module.pos_embed", 1, 16, 32), "unknown keys: module.pos_embed"),
    (put("blocks.00.attn.qkv.weight", 96, 32), "unknown keys: blocks.00.attn.qkv.weight"),
    (put("blocks.1.moe.experts.4.up_proj.weight", 128, 32), "unknown keys: blocks.1.moe.experts.4.up_proj.weight"),
    (put("blocks.1.moe.gate.weight", 5, 32), r"wrong shapes: blocks.1.moe.gate.weight \(5, 32\), expected \(4, 32\)"),
    (put("blocks.0.attn.qkv.weight", 95, 32), r"blocks.0.attn.qkv.weight \(95, 32\), expected \(96, 32\)"),
    (put("pos_embed", 1, 15, 32), "square grid"),
    (put("pos_embed", 16, 32), r"pos_embed has shape \(16, 32\), expected 3 dimensions"),
    (put("x_embedder.proj.weight", 32, 4, 2, 3), "square patches"),
    (put("x_embedder.proj.weight", 0, 4, 2, 2), "square patches"),
    (put("final_layer.linear.weight", 20, 32), "final_layer.linear.weight has 20 rows"),
    (put("blocks.7.attn.qkv.weight", 96, 32), r"missing blocks.2.\*, highest is 7"),
    (put("blocks.999999.attn.qkv.weight", 96, 32), r"missing blocks.2.\*, highest is 999999"),
    (put("blocks.0.moe.gate.weight", 10**4, 32), "10000 rows, more than there are keys"),
    (put("blocks.0.moe.shared_experts.gate_proj.weight", 63, 32), "width 63, expected a multiple"),
    (put("pos_embed", 1, 16, 32, dtype=torch.int64), "not floating-point: pos_embed"),
    (put("pos_embed", 1, 16, 32, dtype=torch.float8_e4m3fn), "not floating-point: pos_embed"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_CONFIG)
@pytest.mark.parametrize("file", [None, "model.pt", "model.safetensors"])
def test_state_dict_that_does_not_fit(
    tmp_path: Path, file: str | None, change: Callable[[State], State], message: str
) -> None:
    source: State | Path = change(official_state())
    if file:
        (save_file if file.endswith("safetensors") else torch.save)(source, tmp_path / file)
        source = tmp_path / file
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(source, num_heads=2)


def test_all_problems_are_in_one_error_and_long_lists_are_cut() -> None:
    state = official_state(experts=16)
    missing = [key for key in state if "down_proj" in key and "experts." in key]
    state = drop(*missing)(state) | {"odd.weight": torch.zeros(2), "final_layer.linear.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(state, num_heads=2)
    text = str(caught.value)
    assert f"({len(missing)} in all)" in text and text.count("down_proj") == MAX_LISTED
    assert "unknown keys: odd.weight" in text and "final_layer.linear.bias (3,), expected (32,)" in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{not json", "no JSON"),
        ("[1, 2]", "is list, expected an object"),
        ({"depth": 10**9}, "depth 1000000000 .the tensors say 2"),
        ({"num_experts": 8, "top_k": 3}, "num_experts 8 .the tensors say 4"),
        ({"mlp_ratio": 3.0}, "mlp_ratio 3.0 .the tensors say 4.0"),
        ({"input_size": 16}, "input_size 16 .the tensors say 8"),
        ({"qk_norm": True}, "qk_norm True .the tensors say False"),
        ({"num_shared_experts": 1}, "num_shared_experts 1 .the tensors say 2"),
        ({"shared_expert": "gelu"}, "shared_expert gelu .the tensors say swiglu"),
        ({"num_heads": 5}, "multiple of num_heads 5"),
        ({"depth": "2"}, "depth: got '2', expected int"),
        ({"run_code": "x"}, "unknown keys"),
    ],
)
def test_native_file_with_a_wrong_configuration(tmp_path: Path, config: object, message: str) -> None:
    model = load_checkpoint(official_state(), num_heads=2)
    text = config if isinstance(config, str) else json.dumps(model.config.to_dict() | config)
    path = tmp_path / "model.safetensors"
    save_file(dict(model.state_dict()), path, metadata={sources.CONFIG_ENTRY: text})
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_native_file_is_not_taken_for_another(tmp_path: Path) -> None:
    path = _written(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no configuration: load it with load_checkpoint"):
        load_model(path)
    native = _written(tmp_path / "native.safetensors")
    with pytest.raises(CheckpointError, match="num_heads=4, but the file's metadata says 2"):
        load_checkpoint(native, num_heads=4)


def test_file_changed_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _written(tmp_path / "model.pt")
    read = sources.TorchSource._get

    def replace_then_read(self: sources.TorchSource, key: str) -> Tensor:
        os.utime(path, ns=(1, 1))
        return read(self, key)

    monkeypatch.setattr(sources, "_MIN_WINDOW", 1024)
    monkeypatch.setattr(sources.TorchSource, "_get", replace_then_read)
    with pytest.raises(CheckpointError, match="was changed while it was being loaded"):
        load_checkpoint(path)


def test_missing_files_and_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(IsADirectoryError):
        load_checkpoint(tmp_path)
    with pytest.raises(TypeError, match="source: got int"):
        load_checkpoint(3)
    for dtype in ("float16", torch.int8):
        with pytest.raises(TypeError, match="dtype: got"):
            load_checkpoint(official_state(), num_heads=2, dtype=dtype)


def _written(path: Path, **options: int) -> Path:
    """A good checkpoint that needs no num_heads, in the form that the name says."""
    state = official_state(**{"head_dim": 16} | options)
    if path.name == "native.safetensors":
        save_model(load_checkpoint(state), path)
    elif path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.name != "legacy.pt")
    load_checkpoint(path)
    return path
