#!/usr/bin/env bash
# scripts/test_matrix.sh [PYTHON...]
# Run the tests on several Pythons, and load the exports of each Python on all others.
# PYTHON is an interpreter (default: python3.10 python3.11 python3.12). Each gets a fresh environment in
# outputs/matrix with the versions of its constraints file; the python of a virtual environment is used as
# it is. PYTEST_ADDOPTS reaches pytest. Prints a table at the end, and exits with 1 if something failed.
set -uo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# \?//p' "$0"; exit; fi
cd "$(dirname "$0")/.."
root=$PWD/outputs/matrix
rm -rf "$root/exports"
mkdir -p "$root"
export PYTHONPATH=$PWD:$PWD/tests PYTHONWARNINGS=ignore
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

pythons=()
for python in "${@:-python3.10 python3.11 python3.12}"; do
  for one in $python; do
    version=$(version_of "$one") || { echo "error: $one does not run; install it, or name another PYTHON" >&2; exit 1; }
    if "$one" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
      pythons+=("$one")
      continue
    fi
    constraints=constraints.txt
    [ "$version" = 3.10 ] && constraints=constraints-3.10.txt
    echo "== Python $version: installing into $root/$version"
    rm -rf "${root:?}/$version"
    "$one" -m venv "$root/$version" || exit 1
    [ "$version" = 3.10 ] && "$root/$version/bin/pip" install --quiet "pip<24.1"  # newer pip refuses the requirements of fairseq 0.12.2
    "$root/$version/bin/pip" install --quiet --constraint "$constraints" --editable '.[test]' || exit 1
    pythons+=("$root/$version/bin/python")
  done
done

failed=0
for python in "${pythons[@]}"; do
  version=$(version_of "$python")
  echo "== Python $version: tests"
  PATH=$(dirname "$python"):$PATH "$python" -m pytest -q > "$root/tests-$version.log" 2>&1 || failed=1
  tail -1 "$root/tests-$version.log"
  "$python" tests/exchange.py make "$root/exports" || failed=1
done
for python in "${pythons[@]}"; do
  version=$(version_of "$python")
  echo "== Python $version: the exports of all Pythons"
  "$python" tests/exchange.py compare "$root/exports" > "$root/exports-$version.log" 2>&1 || failed=1
  grep "^$version \|^error" "$root/exports-$version.log"
done

echo
echo "| Python | fairseq | torch | transformers | tests | exports of all Pythons |"
echo "| --- | --- | --- | --- | --- | --- |"
for python in "${pythons[@]}"; do
  version=$(version_of "$python")
  package() { "$python" -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null; }
  fairseq="fairseq $(package fairseq)"
  [ "$version" != 3.10 ] && fairseq="ve-fairseq $(package ve-fairseq)"
  loaded=$(grep -c "^$version loads" "$root/exports-$version.log")
  read_only=$(grep -c "^$version reads" "$root/exports-$version.log")
  worst=$(sed -n "s/^$version loads.*difference //p" "$root/exports-$version.log" | sort -g | tail -1)
  exports="$loaded compared, largest difference ${worst:-none}"
  [ "$read_only" = 0 ] || exports="$exports; $read_only of s3prl's read"
  tests=$(tail -1 "$root/tests-$version.log" | tr -d '=' | sed 's/ in .*//; s/^ *//')
  echo "| $version | $fairseq | $(package torch) | $(package transformers) | $tests | $exports |"
done
exit $failed
