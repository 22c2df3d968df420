#!/usr/bin/env bash
# Everything behind docs/results/emoji-world.md, in the order in which it matters: about 5 core-hours.
#
#     bash scripts/experiments/emoji_evidence.sh DIR [JOBS]
#
# If it is interrupted, the same command resumes it. docs/results/emoji.json is a copy of DIR/evidence.json.
set -euo pipefail
dir="${1:?the folder for the world, its features and all runs}"
jobs="${2:-2}"
cfg=gram_small_c2+2_ep10_batch32_ctxv1
bench() { gram bench --emoji "$dir" --jobs "$jobs" "$@"; }

# Table 1; JointPrompt is also row 5 of Table 6
bench --trainers ZeroshotCLIP CoOp CoOpGRAM VPT VPTGRAM JointPrompt UniGRAM CoCoOp CoCoOpGRAM
# Table 6, rows 1 to 4
bench --trainers "UniGRAM:${cfg}_no_domain_shift" "UniGRAM:${cfg}_no_regulator" \
    "UniGRAM:${cfg}_no_meta_learning" "UniGRAM:${cfg}_labelled"
# Tables 2 and 3
bench --protocol xd dg --trainers ZeroshotCLIP CoOp CoOpGRAM VPT VPTGRAM UniGRAM CoCoOp JointPrompt
# Table 7
bench --trainers UniGRAM:gram_small_c1+1_ep10_batch32_ctxv1 UniGRAM:gram_small_c3+3_ep10_batch32_ctxv1 \
    UniGRAM:gram_small_c4+4_ep10_batch32_ctxv1
# Tables 4 and 5
bench --protocol xd dg --shots 4 --trainers ZeroshotCLIP CoOp CoOpGRAM VPT VPTGRAM UniGRAM CoCoOp
# Figures 1(b) and 3(a), past ten epochs, and 1(a), on the source of Tables 2 to 5
bench --output "$dir/curves" --meta-dir "$dir/output/meta" --datasets emoji_travel \
    --trainers CoOp CoOpGRAM VPT VPTGRAM OPTIM.MAX_EPOCH 15 TEST.PER_EPOCH True
number=0
for words in "this is a drawing of" "an emoji of the" "one two three four" ""; do
    number=$((number + 1))
    bench --output "$dir/starts/$number" --datasets emoji_travel \
        --trainers CoOp TRAINER.COOP.CTX_INIT "$words" TRAINER.COOP.N_CTX 4
done

gram report "$dir/output" "$dir/curves" "$dir"/starts/* --collect "$dir/evidence.json"
gram report "$dir/evidence.json"
