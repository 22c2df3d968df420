#!/usr/bin/env bash
# Base to new: train on the base classes of a dataset, and test on them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Usage: base2new_train.sh DATASET SEED [KEY VALUE...]

Trains on the base classes of DATASET (the name of its config) and tests on them. base2new_test.sh tests on the new ones.
  DATA=/data TRAINER=UniGRAM bash scripts/gram/base2new_train.sh caltech101 1
HELP
}

arguments 2 "$@"
DATASET="$1" SEED="$2"
shift 2
train "$(base2new_folder train_base "$DATASET" "$SEED")" "$DATASET" "$SEED" \
    DATASET.NUM_SHOTS "$SHOTS" DATASET.SUBSAMPLE_CLASSES base "$@"
