#!/usr/bin/env bash
# Packs documents into the binidx format (.bin and .idx) that RWKV-LM and Megatron use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python make_binidx.py --input example/pretrain/documents.jsonl --output out/pretrain/corpus --ctx_len 128
