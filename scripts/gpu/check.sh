#!/usr/bin/env bash
# Run every part of this package on a GPU within some minutes, and print a table: see check.py. PYTHON names the
# interpreter into which the package is installed.
#
#   bash scripts/gpu/check.sh [--minutes 8] [--device cuda] [--only PART...] -o OUT
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here/../bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -u "$here/check.py" "$@"
