#!/usr/bin/env bash
# The share of right answers to sums that GRPO never saw, before and after.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for model in base tuned; do
  python train.py --eval_only 1 --load_model "out/grpo/$model/rwkv-final.pth" --proj_dir "out/grpo/eval-$model" --grpo 1 \
    --vocab_file example/GRPO/vocabulary.txt --val_file example/GRPO/heldout.jsonl --precision fp32 --grpo_gen_length 8 \
    --reward_funcs example/GRPO/rewards.py:exact,number --reward_weights 1,0.2
done
