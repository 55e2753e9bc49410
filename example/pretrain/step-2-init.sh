#!/usr/bin/env bash
# A new model with the initial values of the tradition.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python train.py --train_stage 1 --load_model 0 --my_testing x070 --n_layer 3 --n_embd 128 --vocab_size 65536 \
  --random_seed 1 --proj_dir out/pretrain
