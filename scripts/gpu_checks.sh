#!/usr/bin/env bash
# scripts/gpu_checks.sh [--here] [--dry-run]
# On a machine with a GPU, in under nine minutes: run the tests that need one, then measure updates of the paper's sizes on
# 64 utterances of 12 s, with s3prl's distiller and fairseq's own modules as baselines. Print one table.
#   --here     use python3 (or the Python that PYTHON names) as it is, for example without a network, and not .venv.
#              scripts/gpu_wheels.txt lists the packages that it may lack.
#   --dry-run  print the commands, and run nothing
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# \?//p' "$0"; exit; fi
here= options=()
for option; do
  if [ "$option" = --here ]; then here=1; else options+=("$option"); fi
done
if [ -z "${options[*]}" ] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && ! [ -e /dev/kfd ] && ! [ -e /dev/dxg ]; then
  echo "error: this machine has no GPU" >&2
  exit 1
fi
if [ -n "$here" ]; then
  cd "$(dirname "$0")/.."
  python=${PYTHON:-python3}
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
  source "$(dirname "$0")/environment.sh"
  python=python
fi
exec "$python" scripts/gpu_checks.py "${options[@]}"
