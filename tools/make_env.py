"""Create or update the project's virtual environment; the make targets run it with any Python >= 3.10.

    python3 tools/make_env.py [--venv .venv]

Where the Python that runs this already sees a torch of the supported range (a GPU machine's own build, say), that torch
stays: the environment borrows all packages of that Python, and only what is missing is installed. Otherwise everything
comes from the locked requirements. Then the project itself is installed in editable mode.
"""

from __future__ import annotations

import argparse
import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 10)
EXTRAS = "bench,demo,dev,emoji"
BORROW_FILE = "borrowed-packages.pth"
VERSION_OF = "from importlib.metadata import version; print(version({!r}))"


def main() -> None:
    """Bring the environment up to date, or exit with the reason why not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    folder = parser.parse_args().venv.absolute()
    if sys.version_info < MIN_PYTHON:
        sys.exit(
            f"got Python {sys.version.split()[0]}, expected {'.'.join(map(str, MIN_PYTHON))} or newer: set PYTHON=..."
        )
    python = folder / "bin" / "python"
    if not python.exists():
        create(folder)
    if (site_packages(python) / BORROW_FILE).exists():
        install_missing(python)
    else:
        install_locked(python)


def create(folder: Path) -> None:
    """Make the environment; let it see this Python's packages if a usable torch is among them."""
    print(f"creating {folder} with {sys.executable}", flush=True)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\nthe module venv does not work here: on Debian and Ubuntu, install the package python3-venv")
    found = installed_version(Path(sys.executable), "torch")
    if found is None or not in_range(found):
        return
    print(f"keeping torch {found} of {sys.executable}", flush=True)
    packages = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    lines = [f"import site; site.addsitedir({path!r})\n" for path in packages if os.path.isdir(path)]
    (site_packages(folder / "bin" / "python") / BORROW_FILE).write_text("".join(lines))


def install_missing(python: Path) -> None:
    """Install what the project needs and the borrowed packages lack, leaving torch and triton as they are."""
    constraints = python.parent.parent / "constraints.txt"
    pins = [(name, installed_version(python, name)) for name in ("torch", "triton")]
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins if version is not None))
    pip(python, "--constraint", str(constraints), "--no-build-isolation", *build_tools(python))
    pip(python, "--constraint", str(constraints), "--no-build-isolation", "--editable", f"{ROOT}[{EXTRAS}]")


def install_locked(python: Path) -> None:
    """Install the locked requirements; a torch of the supported range that is there already is kept."""
    found = installed_version(python, "torch")
    torch_file = (
        [] if found is not None and in_range(found) else ["--requirement", str(ROOT / "requirements/torch.txt")]
    )
    pip(python, *torch_file, "--requirement", str(ROOT / "requirements/dev.txt"))
    pip(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def build_tools(python: Path) -> list[str]:
    """What pip needs to build the project without isolation, as written in pyproject.toml."""
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires is not None, "pyproject.toml names the build requirements on one line"
    return re.findall(r'"([^"]+)"', requires[1])


def in_range(version: str) -> bool:
    """Whether a torch version satisfies the lower bound in pyproject.toml."""
    bound = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert bound is not None, "pyproject.toml gives torch's lower bound as major.minor"
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= (int(bound[1]), int(bound[2]))


def installed_version(python: Path, package: str) -> str | None:
    """The version of a package that this Python sees, or None."""
    command = [str(python), "-c", VERSION_OF.format(package)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=os.sep)
    return result.stdout.strip() if result.returncode == 0 else None


def site_packages(python: Path) -> Path:
    """The folder into which this Python's pip installs."""
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def pip(python: Path, *arguments: str) -> None:
    """pip install, ending this program with pip's own exit status if it fails."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    print("pip install", *arguments, flush=True)
    status = subprocess.run(command, cwd=ROOT).returncode
    if status != 0:
        sys.exit(status)


if __name__ == "__main__":
    main()
