# The other scripts source this file. It makes .venv from constraints.txt once, and puts it on the PATH.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or 3.12 is needed; install one, or name it as PYTHON=/path/to/python" >&2
  return 1
}

wanted=$(cat setup.py constraints.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  if ! [ -x .venv/bin/pip ]; then
    python=$(find_python) || exit 1
    "$python" -m venv .venv
  fi
  echo "== Installing into .venv with $(.venv/bin/python --version)"
  .venv/bin/pip install --quiet --progress-bar off --constraint constraints.txt --editable '.[test]'
  echo "$wanted" > .venv/installed
fi
PATH="$PWD/.venv/bin:$PATH"
# torch's threads wait busily for each other. Beside other work on the cores, they shall give up sooner; see
# docs/training.md.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
