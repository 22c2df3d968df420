#!/usr/bin/env bash
# The runs behind docs/results/emoji-world.md: five meta-seeds, three few-shot seeds, five datasets,
# three protocols; about 18 core-hours.
#
#     bash scripts/experiments/emoji_evidence.sh DIR [JOBS]
#
# If it is interrupted, the same command resumes it. docs/results/emoji.json is a copy of DIR/evidence.json;
# controls.json, more_controls.json and true_names.json are copies of grid.json.
set -euo pipefail
dir="${1:?the folder for the world, its features and all runs}"
mkdir -p "$dir"
dir="$(cd "$dir" && pwd)"
jobs="${2:-2}"
metas="1 2 3 4 5"
base_to_new() { # 16 shots
    gram bench --emoji "$dir" --jobs "$jobs" --protocol base2new "$@"
}
bench() { # every protocol with 16 shots, and the transfers with 4 shots too
    base_to_new "$@"
    gram bench --emoji "$dir" --jobs "$jobs" --protocol xd dg "$@"
    gram bench --emoji "$dir" --jobs "$jobs" --protocol xd dg --shots 4 "$@"
}

# meta_train NAME CONFIG [KEY VALUE ...]: all meta-seeds at once, in DIR/meta/NAME/seed1, ...; what is there goes on
meta_train() {
    meta_train_on "$dir/store" "$dir/hierarchy" "$@"
}
meta_train_on() { # STORE HIERARCHY NAME CONFIG [KEY VALUE ...]
    local store="$1" hierarchy="$2" out="$dir/meta/$3" config="$4" resume=""
    shift 4
    [ -e "$out/seed1/run.json" ] && resume=--resume
    gram pretrain --store "$store" --hierarchy "$hierarchy" --config "$config" -o "$out" $resume \
        "$@" SEEDS "(1, 2, 3, 4, 5)"
}

# Each command ends at once where its result is there
python -c "from gram_meta.demo.world import write_world; write_world('$dir/world', corpus_size=36_000)"
gram embed "$dir/world/corpus/pairs.tsv" -o "$dir/store" --backbone gram-small
gram cluster "$dir/store" -o "$dir/hierarchy" --config-file configs/gram_meta/coop_gram_small.yaml
meta_train coop coop_gram_small
meta_train coop_no_regulator coop_gram_small REGULATOR.ENABLED False
meta_train vpt vpt_gram_small
meta_train joint unigram_gram_small
meta_train cocoop cocoop_gram_small

bench --trainers ZeroshotCLIP CoOp VPT JointPrompt
base_to_new --trainers CoCoOp
base_to_new --output "$dir/class_token" --trainers VPT JointPrompt \
    TRAINER.VPT.VISUAL_INIT class_token TRAINER.JOINT.VISUAL_INIT class_token
for meta in $metas; do
    learned="$dir/meta/coop/seed$meta/best.safetensors"
    plain="$dir/meta/coop_no_regulator/seed$meta/best.safetensors"
    visual="$dir/meta/vpt/seed$meta/best.safetensors"
    joint="$dir/meta/joint/seed$meta/best.safetensors"
    bench --output "$dir/output/meta$meta" --trainers CoOpGRAM TRAINER.GRAM.CHECKPOINT "$learned"
    bench --output "$dir/no_regulator/meta$meta" --trainers CoOpGRAM TRAINER.GRAM.CHECKPOINT "$plain" \
        TRAINER.GRAM.REGULATE False
    bench --output "$dir/visual/meta$meta" --trainers VPTGRAM TRAINER.GRAM.CHECKPOINT "$visual"
    bench --output "$dir/joint/meta$meta" --trainers UniGRAM TRAINER.GRAM.CHECKPOINT "$joint"
    base_to_new --output "$dir/cocoop/meta$meta" --trainers CoCoOpGRAM \
        TRAINER.GRAM.CHECKPOINT "$dir/meta/cocoop/seed$meta/best.safetensors"
done

# Tables 6 and 7: the same with what a meta-training lacks, or with other numbers of tokens
python -c "from gram_meta.bench.emoji import write_labelled; write_labelled('$dir/world', '$dir/labelled')"
gram embed "$dir/labelled" -o "$dir/labelled_store" --backbone gram-small --format classes
gram cluster "$dir/labelled_store" -o "$dir/labelled_hierarchy" \
    --config-file configs/gram_meta/unigram_gram_small_labelled.yaml
unigram() { # NAME CFG STORE HIERARCHY: meta-trains unigram_gram_small_NAME, and runs UniGRAM:CFG
    meta_train_on "$3" "$4" "unigram_$1" "unigram_gram_small_$1"
    for meta in $metas; do
        base_to_new --output "$dir/unigram_$1/meta$meta" --trainers "UniGRAM:$2" \
            TRAINER.GRAM.CHECKPOINT "$dir/meta/unigram_$1/seed$meta/best.safetensors"
    done
}
for lacks in no_regulator no_domain_shift no_meta_learning; do
    unigram $lacks "gram_small_c2+2_ep10_batch32_ctxv1_$lacks" "$dir/store" "$dir/hierarchy"
done
unigram labelled gram_small_c2+2_ep10_batch32_ctxv1_labelled "$dir/labelled_store" "$dir/labelled_hierarchy"
for tokens in 1+1 3+3 4+4; do
    unigram "c$tokens" "gram_small_c${tokens}_ep10_batch32_ctxv1" "$dir/store" "$dir/hierarchy"
done

# More meta-seeds for R's part, the figures, and the ceiling that true names set
grid() { # SCRIPT ARGUMENTS...
    local script="$1"
    shift
    (cd scripts/experiments && python "$script" --store "$dir/store" --hierarchy "$dir/hierarchy" "$@")
}
taken="relative, 600 steps, temperature 2.5, lambda_1 1e-3, lambda_2 1e-3"
plain="no R, 600 steps, temperature 2.5, lambda_1 1e-3"
sets="food travel objects activities faces"
twenty="$(seq 1 20)"
grid meta_grid.py --out "$dir/grid" --only "$taken" "taken, paper's R" --meta-seeds $metas --sets $sets
cp "$dir/grid/grid.json" "$dir/more_controls.json"
grid meta_grid.py --out "$dir/grid" --only "$taken" "$plain" --meta-seeds $twenty --sets $sets \
    --controls "R on" "R off"
grid curves.py --out "$dir/grid" --only "$taken" "$plain" "taken, paper's R" --meta-seeds $metas
grid meta_grid.py --store "$dir/labelled_store" --hierarchy "$dir/labelled_hierarchy" --out "$dir/grid_true_names" \
    --only "taken, true names" --meta-seeds $metas --sets $sets

folders=("$dir/output" "$dir/class_token" "$dir/no_regulator" "$dir/visual" "$dir/joint" "$dir/cocoop" "$dir"/unigram_*)
gram report "${folders[@]}" --collect "$dir/evidence.json"
cp "$dir/grid/grid.json" docs/results/controls.json
cp "$dir/more_controls.json" docs/results/
cp "$dir/grid_true_names/grid.json" docs/results/true_names.json
cp "$dir/evidence.json" docs/results/emoji.json && python scripts/experiments/claims.py   # in a clone
