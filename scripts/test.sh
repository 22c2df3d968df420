#!/usr/bin/env bash
# The test suite, in a virtual environment that this script makes on its first run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
Usage: bash scripts/test.sh [--python PATH] [PYTEST ARGUMENTS...]

Makes .venv in the repository, installs gram-meta[test] into it and runs the tests. A second run starts at once.
All other arguments go to pytest, which runs in the repository: bash scripts/test.sh -x tests/report
If no argument names a test, the files are shared among up to 4 processes of a thread each; the fast tests alone:
bash scripts/test.sh -m "not slow"

HELP
    environment_help
}

environment_options "$@"
prepare_environment test
cd "$ROOT"
names_tests() { # does an argument name a test file or folder?
    local word
    for word in ${REST[@]+"${REST[@]}"}; do
        case "$word" in tests* | *.py*) return 0 ;; esac
    done
    return 1
}

if ! names_tests; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    PROCESSES=$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
    REST+=(--numprocesses "$PROCESSES" --dist loadfile)
fi
exec "$PYTHON" -m pytest ${REST[@]+"${REST[@]}"}
