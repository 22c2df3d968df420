#!/usr/bin/env bash
# ruff, mypy and the layers of imports, in the same environment as the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
Usage: bash scripts/lint.sh [--python PATH]

Runs ruff, mypy and import-linter (the layers contract in pyproject.toml) over the repository.

HELP
    environment_help
}

environment_options "$@"
prepare_environment dev
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -c "from importlinter.cli import lint_imports_command as main; main()"
