#!/usr/bin/env bash
# Tokens of the pairs. ORPO needs no reference, so no model is run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the model to align; the default is the one that quickstart.sh trained

python PrepareOrpoDataset.py --load_model "$MODEL" --input_csv example/ORPO/output_csv/rlhf_example_dataset.csv \
  --output_save example/ORPO/output_save/rlhf_example_dataset.save --target_pair_count 200 --skip_bad 1
