#!/usr/bin/env bash
# A tiny RWKV-7 that knows its sums but is careless: it gives the right answer one time in three.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python train.py --train_stage 1 --load_model 0 --my_testing x070 --n_layer 2 --n_embd 64 --head_size_a 32 --vocab_size 32 \
  --random_seed 1 --proj_dir out/grpo/base
python train.py --load_model out/grpo/base/rwkv-init.pth --proj_dir out/grpo/base --vocab_file example/GRPO/vocabulary.txt \
  --sft 1 --smoothing 0 --data_file example/GRPO/corpus.jsonl --ctx_len 32 --micro_bsz 64 --epoch_steps 600 --epoch_count 1 \
  --lr_init 5e-3 --lr_final 5e-4 --warmup_steps 10 --precision fp32 --grad_cp 0 --quant 0 --random_seed 1
