#!/usr/bin/env bash
# A reward model: what people wrote is better than what the model says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the model to align; the default is the one that quickstart.sh trained

mkdir -p out/ppo
python rlhf_generate_reject_csv.py --load_model "$MODEL" --input_csv example/DPO/input_csv/rlhf_example_dataset.csv \
  --output_csv out/ppo/pairs.csv --strategy 'cuda fp16' --top_p 0.8 --max_tokens 60
python train.py --load_model "$MODEL" --proj_dir out/ppo/reward --rm 1 --rlhf_train_file out/ppo/pairs.csv --skip_bad 1 \
  --val_file example/DPO/heldout.csv --peft lora --lora_r 16 --ctx_len 128 --micro_bsz 16 --epoch_steps 30 --epoch_count 2 \
  --epoch_save 1 --lr_init 2e-3 --lr_final 2e-4 --warmup_steps 5 --precision fp32 --quant 0 --grad_cp 0 --random_seed 1
