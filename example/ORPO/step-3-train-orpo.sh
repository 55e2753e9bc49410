#!/usr/bin/env bash
# ORPO with LoRA on every block.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the model to align; the default is the one that quickstart.sh trained

python train.py --load_model "$MODEL" --proj_dir out/orpo --orpo 1 --orpo_alpha 0.5 \
  --rlhf_train_file example/ORPO/output_save/rlhf_example_dataset.save --val_file example/DPO/heldout.csv \
  --peft lora --lora_r 16 --lora_alpha 32 --ctx_len 128 --micro_bsz 16 --epoch_steps 60 --epoch_count 2 --epoch_save 1 \
  --lr_init 2e-3 --lr_final 2e-4 --warmup_steps 5 --quant 0 --grad_cp 0
