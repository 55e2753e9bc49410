#!/usr/bin/env bash
# From nothing to an aligned model, on a CPU, in a few minutes: trains a tiny RWKV-7 from zero on our own small world
# (it learns to be curt), samples what it would answer, and teaches it by preference (DPO, LoRA) to be courteous.
# Ends with answers before and after, and with the accuracy on held-out preference pairs; fails if that is below 0.9.
# Everything is written to out/quickstart, which is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/environment.sh requirements.txt

python=.venv/bin/python
out=out/quickstart
held_out=example/DPO/heldout.csv
# what train.py would take by itself; here the other commands must be told too
find_precision='from rwkv_rlhf.ops.fastest import fastest_precision; print(fastest_precision("cpu"))'
precision=fp32 steps=450
if [ "$(PYTHONPATH=src $python -c "$find_precision")" = bf16 ]; then precision=bf16 steps=800; fi
# Sleeping threads instead of spinning ones: much faster on a machine that others use as well.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

section() {
  printf '\n=== [%3d s] %s\n' "$SECONDS" "$*"
}

SECONDS=0
rm -rf "$out"
mkdir -p "$out"

section "1. A tiny RWKV-7 with initial values"
$python train.py --train_stage 1 --load_model 0 --my_testing x070 --n_layer 3 --n_embd 128 --vocab_size 65536 \
  --random_seed 1 --proj_dir $out/base

section "2. Training it from zero for about a minute ($steps steps in $precision)"
$python train.py --load_model $out/base/rwkv-init.pth --proj_dir $out/base --sft 1 --smoothing 0 \
  --data_file example/quickstart/corpus.jsonl --ctx_len 64 --micro_bsz 16 --epoch_steps $steps --epoch_count 1 \
  --lr_init 2e-3 --lr_final 2e-4 --warmup_steps 10 --precision $precision --grad_cp 0 --quant 0 --random_seed 1
base=$out/base/rwkv-final.pth

section "3. Rejects: what this model answers to the prompts of the preference data"
$python rlhf_generate_reject_csv.py --load_model $base --input_csv example/DPO/input_csv/rlhf_example_dataset.csv \
  --output_csv $out/pairs.csv --strategy 'cuda fp16' --max_tokens 60 --batch_size 64 --top_p 0.8

section "4. Pairs as tokens, with reference log-probabilities"
$python rlhf_dpo_generate_save.py --load_model $base --input_csv $out/pairs.csv --output_save $out/pairs.save \
  --target_pair_count 240 --strategy "cuda $precision" --skip_bad 1

section "5. DPO with LoRA by layer profile"
$python train.py --load_model $base --proj_dir $out/dpo --dpo 1 --dpo_beta 0.1 --dpo_alpha 1 \
  --rlhf_train_file $out/pairs.save --layer_profile example/quickstart/profile.csv --val_file $held_out --ctx_len 128 \
  --micro_bsz 16 --epoch_steps 60 --epoch_count 2 --epoch_save 1 --warmup_steps 5 --precision $precision --grad_cp 0 \
  --quant 0 --random_seed 1

section "6. Merging the adapter into the model"
merged=$out/merged.pth
$python merge.py --base_model $base --lora_checkpoint $out/dpo/rwkv-final.pth --output $merged

section "7. Held-out pairs and answers, before and after"
$python train.py --load_model $base --proj_dir $out/eval_before --eval_only 1 --val_file $held_out --precision fp32
$python train.py --load_model $merged --proj_dir $out/eval_after --eval_only 1 --val_file $held_out --precision fp32
for model in "$base before" "$merged after"; do
  set -- $model
  $python chat.py --load_model "$1" --prompt_file example/quickstart/prompts.jsonl --output "$out/$2.jsonl" \
    --temperature 0 --max_tokens 40
done

section "8. What changed (curves: $out/base/curves.png, $out/dpo/curves.png; talk: python chat.py --load_model $merged)"
$python example/quickstart/compare.py $out/before.jsonl $out/after.jsonl $out/eval_before/metrics.jsonl \
  $out/eval_after/metrics.jsonl
