#!/usr/bin/env bash
# The runs behind docs/results/emoji-world.md: five meta-seeds, three few-shot seeds, five datasets,
# three protocols; about 9 core-hours.
#
#     bash scripts/experiments/emoji_evidence.sh DIR [JOBS]
#
# If it is interrupted, the same command resumes it. docs/results/emoji.json is a copy of DIR/evidence.json.
set -euo pipefail
dir="${1:?the folder for the world, its features and all runs}"
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
    local out="$dir/meta/$1" config="$2" resume=""
    shift 2
    [ -e "$out/seed1/run.json" ] && resume=--resume
    gram pretrain --store "$dir/store" --hierarchy "$dir/hierarchy" --config "$config" -o "$out" $resume \
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
done

folders=("$dir/output" "$dir/class_token" "$dir/no_regulator" "$dir/visual" "$dir/joint")
gram report "${folders[@]}" --collect "$dir/evidence.json"
cp "$dir/evidence.json" docs/results/emoji.json && python scripts/experiments/claims.py   # in a clone
