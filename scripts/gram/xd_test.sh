#!/usr/bin/env bash
# Cross-dataset: test what was trained on the source on another dataset.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Usage: xd_test.sh DATASET SEED [KEY VALUE...]

Tests what xd_train.sh has trained, with the same environment, on all classes of DATASET.
  DATA=/data TRAINER=UniGRAM bash scripts/gram/xd_test.sh caltech101 1
HELP
}

arguments 2 "$@"
DATASET="$1" SEED="$2"
shift 2
evaluate "$(target_folder "$DATASET" "$SEED")" "$(source_folder "$SEED")" "$DATASET" "$SEED" "$@"
