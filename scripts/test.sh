#!/usr/bin/env bash
# The test suite, in a virtual environment that this script makes on its first run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
Usage: bash scripts/test.sh [--python PATH] [PYTEST ARGUMENTS...]

Makes .venv in the repository, installs gram-meta[test] into it and runs the tests. A second run starts at once.
Everything else is handed to pytest, which runs in the repository: bash scripts/test.sh -x tests/test_report.py
With nothing handed over, the files are shared among up to 4 processes of a thread each.

HELP
    environment_help
}

environment_options "$@"
prepare_environment test
cd "$ROOT"
if [ "${#REST[@]}" -eq 0 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    PROCESSES=$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
    REST=(--numprocesses "$PROCESSES" --dist loadfile)
fi
exec "$PYTHON" -m pytest ${REST[@]+"${REST[@]}"}
