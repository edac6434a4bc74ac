#!/usr/bin/env bash
# On a machine with a GPU: run the tests that need one, then measure the paper's sizes on 64 utterances of 12 s.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python -c "import sys, torch; torch.cuda.is_available() or sys.exit('error: torch sees no GPU')"
python -m pytest -q tests/gpu
for precision in fp32 bf16; do
  echo "== Student in $precision, 64 x 12 s"
  python scripts/benchmark.py --batch 64 --seconds 12 --precision "$precision" --device cuda
done
