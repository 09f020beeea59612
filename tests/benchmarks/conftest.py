"""What the tests of several command lines share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

CollectingMain = Callable[[Callable[[Sequence[str]], int], str], dict[str, Any]]


@pytest.fixture
def collected(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CollectingMain:
    """Run a main that ends in `results.collect`, on the reference backend; what it wrote, which it must have printed.

    Triton's interpreter would take minutes, and is wrong in bf16.
    """
    monkeypatch.setenv("DIT_MOE_BACKEND", "reference")

    def run(main: Callable[[Sequence[str]], int], arguments: str) -> dict[str, Any]:
        out = tmp_path / "folder" / "result.json"
        assert main([*arguments.split(), "--out", str(out)]) == 0
        result = json.loads(out.read_text())
        assert result == json.loads(capsys.readouterr().out)
        return result

    return run
