#!/usr/bin/env bash
# Resolve requirements/dev.txt anew, for every supported Python. Needs uv. torch and triton stay in torch.txt, with their
# versions set by hand: their CUDA libraries must not be forced on a machine that takes a CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
torch_needs=$(mktemp)
without_torch=$(mktemp)
trap 'rm -f "$torch_needs" "$without_torch"' EXIT
printf '%s\n' filelock fsspec jinja2 networkx sympy typing-extensions >"$torch_needs"
printf '%s\n' "torch; python_version < '3'" "triton; python_version < '3'" >"$without_torch"
uv pip compile pyproject.toml "$torch_needs" --extra demo --extra emoji --extra analysis --extra bench --extra dev \
  --override "$without_torch" --universal --python-version 3.10 --no-annotate --upgrade \
  --custom-compile-command requirements/update.sh --output-file requirements/dev.txt
