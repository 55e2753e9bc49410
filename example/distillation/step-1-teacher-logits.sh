#!/usr/bin/env bash
# The teacher's 100 largest logits for each token of the documents. Stopped and started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
TEACHER="${1:-out/quickstart/merged.pth}" # the default is the courteous model that quickstart.sh aligned

python distillation_generate_h5.py --load_model "$TEACHER" --input_folder example/SFT/chats.jsonl \
  --output_parquet out/distillation/chats.h5 --top_k 100 --strategy auto
