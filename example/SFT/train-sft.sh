#!/usr/bin/env bash
# Supervised fine-tuning on chats: the assistant's turns are learnt, with LoRA on every block.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the model to align; the default is the one that quickstart.sh trained

python train.py --load_model "$MODEL" --proj_dir out/sft --sft 1 --data_file example/SFT/chats.jsonl --peft lora \
  --lora_r 16 --lora_alpha 32 --ctx_len 256 --micro_bsz 6 --epoch_steps 20 --epoch_count 4 --epoch_save 4 \
  --lr_init 1e-3 --lr_final 1e-4 --warmup_steps 5 --quant 0 --grad_cp 0
