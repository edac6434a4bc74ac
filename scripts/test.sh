#!/usr/bin/env bash
# Run the tests, in an environment that is made where it is missing. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec python -m pytest "$@"
