#!/usr/bin/env bash
# Domain generalisation: test what was trained on the source on its variants.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Usage: dg_test.sh SEED [KEY VALUE...]

Tests what xd_train.sh has trained, with the same environment, on each dataset in TARGETS (default: imagenetv2
imagenet_sketch imagenet_a imagenet_r).
  DATA=/data TRAINER=UniGRAM bash scripts/gram/dg_test.sh 1
HELP
}

arguments 1 "$@"
SEED="$1"
shift
for DATASET in ${TARGETS:-imagenetv2 imagenet_sketch imagenet_a imagenet_r}; do
    evaluate "$(target_folder "$DATASET" "$SEED")" "$(source_folder "$SEED")" "$DATASET" "$SEED" "$@"
done
