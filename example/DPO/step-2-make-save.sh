#!/usr/bin/env bash
# Tokens and reference log-probabilities of the pairs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the model to align; the default is the one that quickstart.sh trained

python rlhf_dpo_generate_save.py --load_model "$MODEL" --input_csv example/DPO/output_csv/rlhf_example_dataset.csv \
  --output_save example/DPO/output_save/rlhf_example_dataset.save --target_pair_count 240 --skip_bad 1 --strategy 'cuda bf16'
