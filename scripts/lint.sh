#!/usr/bin/env bash
# ruff, mypy and import-linter, in the same environment as the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
Usage: bash scripts/lint.sh [--python PATH]

Runs ruff over the repository, mypy over gram_meta, trainers and datasets, and checks the layers contract (import-linter).

HELP
    environment_help
}

environment_options "$@"
prepare_environment dev
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$BIN/lint-imports"
