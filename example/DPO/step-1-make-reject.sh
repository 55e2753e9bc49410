#!/usr/bin/env bash
# Samples the answers that are to be rejected. Stopped half way, it goes on where it ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the model to align; the default is the one that quickstart.sh trained

python rlhf_generate_reject_csv.py --load_model "$MODEL" --input_csv example/DPO/input_csv/rlhf_example_dataset.csv \
  --output_csv example/DPO/output_csv/rlhf_example_dataset.csv --strategy 'cuda fp16' --top_p 0.8 --max_tokens 200
