#!/usr/bin/env bash
# PPO: the model answers the prompts, the reward model judges, and better answers become likelier.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the one of step 1

python train.py --load_model "$MODEL" --proj_dir out/ppo/policy --ppo 1 --reward_model out/ppo/reward \
  --rlhf_train_file out/ppo/pairs.csv --val_file example/DPO/heldout.csv --batch_size 32 --mini_batch_size 16 --steps 640 \
  --ppo_epochs 2 --output_max_length 32 --missing_eos_penalty 1 --init_kl_coef 0.05 --save_freq 10 --peft lora --lora_r 16 \
  --lr_init 1e-3 --lr_final 1e-3 --precision fp32 --quant 0 --grad_cp 0 --random_seed 1
python merge.py --base_model "$MODEL" --lora_checkpoint out/ppo/policy/rwkv-final.pth --output out/ppo/merged.pth
