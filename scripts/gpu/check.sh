#!/usr/bin/env bash
# Run every part of this package on a GPU within some minutes, and print the table: see check.py. PYTHON: the interpreter
# into which the package is installed.
#
#   bash scripts/gpu/check.sh [--minutes 8] [--device cuda] [--only PART...] -o OUT
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/check.py" "$@"
