#!/usr/bin/env bash
# The demo, from drawings to a table, in a virtual environment that this script makes on its first run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'HELP'
Usage: bash scripts/demo.sh [--python PATH] [--no-install] [ARGUMENTS OF gram demo...]

Makes .venv in the repository, installs gram-meta[demo] into it and runs `gram demo`: image-text pairs, clustering,
meta-training, few-shot training beside the baselines, and a table. A second run starts at once, and a run that was
interrupted resumes. `bash scripts/demo.sh --full` is the long version.

HELP
    environment_help
}

environment_options "$@"
prepare_environment demo
exec "$BIN/gram" demo ${REST[@]+"${REST[@]}"}
