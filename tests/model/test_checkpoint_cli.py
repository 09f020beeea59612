"""dit-moe convert and upcycle from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from dit_moe.checkpoint import export_state_dict, load_checkpoint, load_model
from dit_moe.cli.convert import convert
from dit_moe.cli.upcycle import upcycle
from tests.model.checkpoint_cases import assert_same_bytes, official_state


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(convert)
    app.command()(upcycle)
    return app


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save({"ema": official_state(head_dim=16, dtype=torch.float16)}, tmp_path / "official.pt")
    return tmp_path / "official.pt"


def run(app: typer.Typer, *arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_there_and_back(app: typer.Typer, source: Path, tmp_path: Path) -> None:
    native, back = tmp_path / "native.safetensors", tmp_path / "back.pt"
    assert "4 experts, top 2" in run(app, "convert", source, native)
    run(app, "convert", native, back, "--to", "official")
    expected = torch.load(source, weights_only=True)["ema"]
    assert_same_bytes(torch.load(back, weights_only=True), expected)
    assert_same_bytes(export_state_dict(load_model(native)), expected)


def test_options(app: typer.Typer, tmp_path: Path) -> None:
    torch.save(official_state(), tmp_path / "timm.pt")
    target = tmp_path / "out.safetensors"
    assert "pass num_heads" in run(app, "convert", tmp_path / "timm.pt", target, code=1)
    assert not target.exists()
    run(app, "convert", tmp_path / "timm.pt", target, "--num-heads", 4, "--dtype", "bfloat16", "--top-k", 3)
    model = load_model(target)
    assert (model.config.num_heads, model.config.top_k, model.pos_embed.dtype) == (4, 3, torch.bfloat16)


def test_errors_are_one_line(app: typer.Typer, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    assert "No such file" in run(app, "convert", tmp_path / "absent.pt", target, code=1)
    source.write_bytes(source.read_bytes()[:1000])
    assert "truncated or corrupted" in run(app, "convert", source, target, code=1)
    assert "is the source" in run(app, "convert", source, source, "--force", code=1)
    assert "is no folder" in run(app, "convert", source, tmp_path / "absent" / "x", code=1)
    target.write_bytes(b"mine")
    assert "pass --force" in run(app, "convert", source, target, code=1)
    assert target.read_bytes() == b"mine"


def test_brackets_in_an_error_are_printed(app: typer.Typer, tmp_path: Path) -> None:
    """rich would take [bold] in a file name for markup."""
    path = tmp_path / "[bold]model.pt"
    path.write_bytes(b"PK\x03\x04")
    assert "[bold]model.pt" in run(app, "convert", path, tmp_path / "out", code=1)


def test_upcycle(app: typer.Typer, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "more.safetensors"
    output = run(
        app, "upcycle", source, target, "--num-experts", 8, "--exact", "--noise-std", 0.1, "--dtype", "float32"
    )
    assert "8 experts, top 4" in output and "note:" not in output
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)
    with torch.no_grad():
        got, expected = load_model(target)(x, t, y), load_checkpoint(source, dtype=torch.float32)(x, t, y)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_upcycle_notes_and_errors(app: typer.Typer, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "more.pt"
    output = run(app, "upcycle", source, target, "--num-experts", 8, "--exact", "--to", "official")
    assert "load this file with top_k=4" in output and "never part" in output
    assert "multiple of 4" in run(app, "upcycle", source, target, "--num-experts", 6, "--exact", "--force", code=1)
    torch.save(official_state(experts=0), source)
    dense = ("upcycle", source, target, "--num-experts", 8, "--num-heads", 2, "--force")
    assert "output is not the source's" in run(app, *dense)


def test_upcycle_exactly_from_dense(app: typer.Typer, tmp_path: Path) -> None:
    source, target = tmp_path / "dense.pt", tmp_path / "more.safetensors"
    torch.save(official_state(experts=0), source)
    options = ("--num-experts", 8, "--num-heads", 2, "--exact")
    assert "shared_expert: got 'gelu'" in run(app, "upcycle", source, target, *options, "--to", "official", code=1)
    assert not target.exists()
    output = run(app, "upcycle", source, target, *options)
    assert "8 experts, top 2" in output and "no official layout" in output
    assert "never part" not in output and "output is not the source's" not in output
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)
    with torch.no_grad():
        got, expected = load_model(target)(x, t, y), load_checkpoint(source, num_heads=2)(x, t, y)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert "shared_expert: got 'gelu'" in run(app, "convert", target, tmp_path / "no.pt", "--to", "official", code=1)
