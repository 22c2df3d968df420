#!/usr/bin/env bash
# ruff, mypy, import-linter and the strict build of the documentation, in the same environment as the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
Usage: bash scripts/lint.sh [--python PATH]

Runs ruff over the repository, mypy over gram_meta, trainers and datasets, checks the layers contract (import-linter),
and builds the documentation as a site (build/site); a warning of the build is an error.

HELP
    environment_help
}

environment_options "$@"
prepare_environment dev
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$BIN/lint-imports"
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs --quiet build
