#!/usr/bin/env bash
# The student learns from the texts (--alpha) and from what the teacher thought of each token of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
STUDENT="${1:-out/quickstart/base/rwkv-final.pth}" # the curt model that quickstart.sh pre-trained

python train.py --load_model "$STUDENT" --proj_dir out/distillation --distillation 1 --temperature 2 --alpha 0.1 \
  --kd_tail 1 --train_data_file out/distillation/chats.h5 --peft lora --lora_r 16 --lora_alpha 32 --ctx_len 256 \
  --micro_bsz 6 --epoch_steps 20 --epoch_count 4 --epoch_save 4 --lr_init 1e-3 --lr_final 1e-4 --warmup_steps 5 \
  --quant 0 --grad_cp 0
