# shellcheck shell=bash
# Sourced by the scripts beside it: settings from the environment, and the one call of train.py that they all make.
# Needs bash 3.2 or later. Changes no folder: relative paths start at the current folder.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
SCRIPT="$(basename "$0")"

fail() {
    printf '%s: %s\n' "$SCRIPT" "$*" >&2
    exit 2
}

common_help() {
    cat <<'HELP'

From the environment:
  DATA        folder of the datasets' folders (needed)
  TRAINER     CoOpGRAM, UniGRAM, CoOp, ZeroshotCLIP, ... (default: CoOpGRAM)
  BACKBONE    beginning of the config's name: vit_b16, vit_b32, vit_l14, gram_small (default: vit_b16)
  CFG         bare name of the trainer's config (default: the trainer's own for BACKBONE)
  SHOTS       images per class to train on, such as 16 or 4 (default: 16)
  SOURCE      dataset that xd_train.sh trains on (default: imagenet)
  LOADEP      epoch to test (default: the last that was saved, 10 with these configs)
  OUTPUT      folder for all runs (default: output)
  META        meta-checkpoint of a GRAM trainer (default: META_DIR/<the config's TRAINER.GRAM.META>/best.safetensors)
  META_DIR    folder of meta-trainings (default: OUTPUT/meta)
  PYTHON      interpreter (default: python)
KEY VALUE pairs at the end go to train.py. Finished runs are skipped, unfinished ones resume.
HELP
}

# arguments COUNT "$@": print the help if asked; require COUNT words, after which KEY VALUE pairs may follow.
arguments() {
    local count="$1" word
    shift
    for word in "$@"; do
        case "$word" in -h | --help) usage; common_help; exit 0 ;; esac
    done
    [ $# -ge "$count" ] || fail "expected $count argument(s), found $#; see $SCRIPT -h"
    [ $((($# - count) % 2)) -eq 0 ] || fail "expected KEY VALUE pairs at the end, found ${*: -1} without a value"
    settings
}

check_seed() {
    case "$1" in '' | *[!0-9]*) fail "expected a number from 0 on as SEED, found '$1'" ;; esac
}

settings() {
    : "${DATA:=}" "${TRAINER:=CoOpGRAM}" "${BACKBONE:=vit_b16}" "${SHOTS:=16}" "${SOURCE:=imagenet}" "${LOADEP:=}"
    : "${OUTPUT:=output}" "${META:=}" "${PYTHON:=python}"
    : "${META_DIR:=$OUTPUT/meta}" "${CFG:=$(default_config)}"
    command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON: expected an interpreter, found no $PYTHON"
    [ -n "$DATA" ] || fail "DATA: expected the folder of the datasets' folders, found nothing; see $SCRIPT -h"
    [ -d "$DATA" ] || fail "DATA: expected a folder, found none at $DATA"
    [ -d "$ROOT/configs/trainers/$TRAINER" ] ||
        fail "TRAINER: expected one of $(cd "$ROOT/configs/trainers" && echo *), found $TRAINER"
    [ -f "$(config_file)" ] || fail "$(config_file): expected the config of TRAINER and CFG, found no such file"
    case "$TRAINER" in *GRAM) find_meta ;; esac
}

default_config() {
    case "$TRAINER" in
        ZeroshotCLIP) echo "$BACKBONE" ;;
        CoCoOp | CoCoOpGRAM) echo "${BACKBONE}_c4_ep10_batch1_ctxv1" ;;
        JointPrompt | UniGRAM) echo "${BACKBONE}_c2+2_ep10_batch32_ctxv1" ;;
        *) echo "${BACKBONE}_c4_ep10_batch32_ctxv1" ;;
    esac
}

config_file() {
    echo "$ROOT/configs/trainers/$TRAINER/$CFG.yaml"
}

find_meta() {
    local name
    name="$(sed -n 's/^ *META: *"\{0,1\}\([^"# ]*\).*/\1/p' "$(config_file)")"
    if [ -z "$META" ]; then
        [ -n "$name" ] || fail "$(config_file): expected TRAINER.GRAM.META, found none; give META=FILE"
        META="$META_DIR/$name/best.safetensors"
    fi
    [ -f "$META" ] || fail "$META: expected the meta-checkpoint for $TRAINER, found no such file; make it with" \
        "\`gram pretrain --store STORE --hierarchy HIERARCHY --config configs/gram_meta/${name:-NAME}.yaml" \
        "-o $(dirname "$META")\`, or give META=FILE"
}

# train FOLDER DATASET SEED [FLAG OR KEY VALUE...]
train() {
    local folder="$1" dataset="$2" seed="$3" zero_shot=()
    shift 3
    [ "$TRAINER" != ZeroshotCLIP ] || zero_shot=(--eval-only) # has nothing to train
    launch "$folder" "$dataset" "$seed" ${zero_shot[@]+"${zero_shot[@]}"} "$@"
}

# evaluate FOLDER MODEL_FOLDER DATASET SEED [KEY VALUE...]
evaluate() {
    local folder="$1" model=(--model-dir "$2") dataset="$3" seed="$4"
    shift 4
    [ -z "$LOADEP" ] || model+=(--load-epoch "$LOADEP")
    [ "$TRAINER" != ZeroshotCLIP ] || model=()
    launch "$folder" "$dataset" "$seed" --eval-only ${model[@]+"${model[@]}"} "$@"
}

launch() {
    local folder="$1" dataset="$2" seed="$3" meta=()
    shift 3
    check_seed "$seed"
    case "$TRAINER" in *GRAM) meta=(TRAINER.GRAM.CHECKPOINT "$META") ;; esac
    "$PYTHON" "$ROOT/train.py" \
        --root "$DATA" \
        --seed "$seed" \
        --trainer "$TRAINER" \
        --dataset-config-file "configs/datasets/$dataset.yaml" \
        --config-file "$(config_file)" \
        --output-dir "$folder" \
        "$@" ${meta[@]+"${meta[@]}"}
}

# CoOp's folders
base2new_folder() { # train_base or test_new, DATASET, SEED
    echo "$OUTPUT/base2new/$1/$2/shots_$SHOTS/$TRAINER/$CFG/seed$3"
}

source_folder() { # SEED
    echo "$OUTPUT/$SOURCE/$TRAINER/${CFG}_${SHOTS}shots/seed$1"
}

target_folder() { # DATASET, SEED
    echo "$OUTPUT/evaluation/$TRAINER/${CFG}_${SHOTS}shots/$1/seed$2"
}
