#!/usr/bin/env bash
# GRPO: eight answers to each sum, and those above the mean of their group become likelier.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MODEL="${1:-out/grpo/base/rwkv-final.pth}" # the default is the one of step 1

python train.py --load_model "$MODEL" --proj_dir out/grpo/tuned --vocab_file example/GRPO/vocabulary.txt --grpo 1 \
  --rlhf_train_file example/GRPO/prompts.jsonl --reward_funcs example/GRPO/rewards.py:exact,number --reward_weights 1,0.2 \
  --val_file example/GRPO/heldout.jsonl --grpo_gen_count 8 --grpo_gen_length 8 --grpo_kl_beta 0.01 --micro_bsz 16 \
  --epoch_steps 20 --epoch_count 3 --epoch_save 3 --lr_init 1e-3 --lr_final 1e-3 --precision fp32 --grad_cp 0 --quant 0 \
  --random_seed 1
