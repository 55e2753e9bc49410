#!/usr/bin/env bash
# Trains on every token of the corpus; started again, it goes on from the newest rwkv-*.pth in the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python train.py --load_model 0 --train_stage 3 --proj_dir out/pretrain --data_file out/pretrain/corpus --data_type binidx \
  --vocab_size 65536 --ctx_len 128 --micro_bsz 4 --epoch_steps 100 --epoch_count 5 --epoch_save 1 --lr_init 2e-3 \
  --lr_final 2e-4 --warmup_steps 10 --quant 0 --grad_cp 0
