#!/usr/bin/env bash
# Base to new: test what was trained on the base classes of a dataset on its new ones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Usage: base2new_test.sh DATASET SEED [KEY VALUE...]

Tests what base2new_train.sh has trained, with the same environment, on the new classes of DATASET (SUB=base: on the base
classes; SUB=all: on all of them).
  DATA=/data TRAINER=UniGRAM bash scripts/gram/base2new_test.sh caltech101 1
HELP
}

arguments 2 "$@"
DATASET="$1" SEED="$2" SUB="${SUB:-new}"
shift 2
evaluate "$(base2new_folder "test_$SUB" "$DATASET" "$SEED")" "$(base2new_folder train_base "$DATASET" "$SEED")" \
    "$DATASET" "$SEED" DATASET.NUM_SHOTS "$SHOTS" DATASET.SUBSAMPLE_CLASSES "$SUB" "$@"
