#!/usr/bin/env bash
# Writes the adapter into the model; rank, alpha and storage are known from rwkv-final.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
MODEL="${1:-out/quickstart/base/rwkv-final.pth}" # the model to align; the default is the one that quickstart.sh trained

python merge.py --base_model "$MODEL" --lora_checkpoint out/dpo/rwkv-final.pth --output out/dpo/merged.pth
