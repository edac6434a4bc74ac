#!/usr/bin/env bash
# scripts/soak.sh [KILLS]
# Kill a small training hundreds of times and damage its checkpoints; print the updates lost, which must be none.
# KILLS is 300 by default, which takes about ten minutes on two free cores.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# \?//p' "$0"; exit; fi
source "$(dirname "$0")/environment.sh"
SOAK_KILLS=${1:-300} exec python -m pytest -q -s --no-header tests/soak.py
