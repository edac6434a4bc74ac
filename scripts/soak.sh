#!/usr/bin/env bash
# Kill a small training hundreds of times and damage its checkpoints; print what was lost, which must be nothing.
#   scripts/soak.sh [KILLS]    default 300, about ten minutes on two cores of their own
set -euo pipefail
source "$(dirname "$0")/environment.sh"
SOAK_KILLS=${1:-300} exec python -m pytest -q -s --no-header tests/soak.py
