"""The tile schedulers of the Hopper products, compiled for the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


def test_each_row_meets_each_column_once(tmp_path: Path) -> None:
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "schedulers"
    source = Path(__file__).with_name("schedulers.cpp")
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", f"-I{CSRC / 'sm90'}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
