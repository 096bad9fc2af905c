#!/bin/sh
# Kernels, extension and rollouts on a GPU, in one call of under ten minutes: correctness, then benchmarks, then
# benchmarks/results/<gpu>.csv. Nothing is fetched: PYTHON (default python3) has torch, triton, pydantic, PyYAML, pytest,
# pytest-benchmark, hypothesis, scipy and setuptools; the package is installed from this folder, its extension with it.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export TRITON_INTERPRET=0
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device is visible"'
"$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
# A failure stops the script here, and no row is written.
"$PYTHON" -m pytest -m gpu tests/kernels tests/extension tests/test_rollout.py
"$PYTHON" -m pytest benchmarks -o python_files='*.py' -m '' --benchmark-columns=min,median,max --write-results
