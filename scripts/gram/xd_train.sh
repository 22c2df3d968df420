#!/usr/bin/env bash
# Cross-dataset and domain generalisation: train on all classes of the source.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Usage: xd_train.sh SEED [KEY VALUE...]

Trains on all classes of SOURCE. xd_test.sh tests on another dataset, dg_test.sh on variants of ImageNet.
  DATA=/data TRAINER=UniGRAM bash scripts/gram/xd_train.sh 1
HELP
}

arguments 1 "$@"
SEED="$1"
shift
train "$(source_folder "$SEED")" "$SOURCE" "$SEED" DATASET.NUM_SHOTS "$SHOTS" "$@"
