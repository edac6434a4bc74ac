#!/usr/bin/env bash
# scripts/gpu_checks.sh
# On a machine with a GPU: run the tests that need one, then measure updates of the paper's sizes on 64 utterances of
# 12 s, with s3prl's distiller and fairseq's own modules as baselines.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# \?//p' "$0"; exit; fi
source "$(dirname "$0")/environment.sh"
python -c "import sys, torch; torch.cuda.is_available() or sys.exit('error: torch sees no GPU')"
python -m pytest -q tests/gpu
fairseq-stack benchmark --batch 64 --seconds 12 --precision fp32 bf16 fp16 --device cuda --baseline s3prl fairseq
