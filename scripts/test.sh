#!/usr/bin/env bash
# scripts/test.sh [ARGUMENT...]
# Run the tests. If the environment is missing, it is made first (see scripts/environment.sh).
# The arguments go to pytest; scripts/test.sh tests/unit runs the quick tests.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# \?//p' "$0"; exit; fi
source "$(dirname "$0")/environment.sh"
# One test file runs on each core, on up to four cores. They start in the order of tests/conftest.py, the longest first.
# They compute on the CPU, also where there is a GPU, which gives other last digits each time. scripts/gpu_checks.sh runs
# the tests of a GPU.
CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 exec python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
