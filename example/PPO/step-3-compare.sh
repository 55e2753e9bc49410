#!/usr/bin/env bash
# Rewards of answers to prompts that nothing trained on, and a few answers, before and after.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the one of step 1

for model in "$MODEL before" "out/ppo/merged.pth after"; do
  set -- $model
  python train.py --eval_only 1 --load_model "$1" --proj_dir "out/ppo/eval-$2" --ppo 1 --reward_model out/ppo/reward \
    --val_file example/DPO/heldout.csv --output_max_length 32 --precision fp32 --quant 0
  python chat.py --load_model "$1" --prompt_file example/quickstart/prompts.jsonl --output "out/ppo/$2.jsonl" --temperature 0 \
    --max_tokens 40
  cat "out/ppo/$2.jsonl"
done
