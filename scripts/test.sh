#!/usr/bin/env bash
# scripts/test.sh [ARGUMENT...]
# Run the tests, in an environment that is made where it is missing (see scripts/environment.sh).
# The arguments go to pytest; scripts/test.sh tests/unit runs the quick ones.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# \?//p' "$0"; exit; fi
source "$(dirname "$0")/environment.sh"
# Files of tests run side by side, as many as there are cores, up to four; none needs more than one core. They start in the
# order of tests/conftest.py, the longest first.
OMP_NUM_THREADS=1 exec python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
