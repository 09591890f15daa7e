#!/usr/bin/env bash
# Train a small model that answers questions, from scratch, in minutes, on a CPU: bash quickstart.sh
# It sets up .venv, then runs every stage on dataset/sample with the toy preset. Results and report.html are in out/quickstart.
# A second run replaces them. On a busy machine: OMP_NUM_THREADS=1 bash quickstart.sh
cd "$(dirname "$0")"
. ./setup_env.sh requirements.txt
out=out/quickstart
stage() { printf '\n=== %s: %s\n' "$1" "$2"; }
common="--out_dir $out --preset toy --max_seq_len 256 --device cpu --overwrite"
SECONDS=0

stage tokenizer "learn the pieces of text that a model reads and writes"
python train_tokenizer.py --data_path dataset/sample/*corpus.jsonl --vocab_size 2000 --out_dir $out/tokenizer --overwrite

stage data "convert raw dumps to training files"
python data_process.py all --data_dir dataset/sample --out_dir $out/data

stage pretrain "learn language from plain text"
python 1-pretrain.py $common --data_path $out/data/pretrain_data.csv --embedding_lr_scale 3 --batch_size 16 --epochs 3.5

stage eval_pretrain "the base model continues texts"
python 0-eval_pretrain.py --out_dir $out --device cpu --max_new_tokens 30 --prompt "The capital of France is" --prompt "中国的首都是"

stage full_sft "learn to answer from dialogues"
python 3-full_sft.py $common --data_path $out/data/sft_data.csv --batch_size 8 --epochs 2

stage lora "learn a new identity with a small adapter"
python 4-lora_sft.py $common --lora_name identity --data_path dataset/sample/lora_identity.jsonl \
    --rank 16 --alpha 32 --learning_rate 2e-3 --batch_size 2 --epochs 15 --log_interval 50

stage dpo "learn to prefer the better of two answers"
python 5-dpo_train.py $common --data_path $out/data/dpo/train_data.json \
    --learning_rate 1e-4 --beta 0.5 --batch_size 16

stage exercises "learn to think and to call tools, from examples"
exercises="$common --out_dir $out/exercises --max_seq_len 384"
python 3-full_sft.py $exercises --init_from $out/full_sft_192.pth \
    --data_path dataset/sample/rlvr_sft.jsonl --batch_size 4 --epochs 2

stage rlvr "learn from answers that were right"
python 6-rlvr_train.py $exercises --data_path dataset/sample/rlvr_data.jsonl --max_new_tokens 64 --max_steps 25 \
    --batch_size 8 --group_size 16 --learning_rate 5e-5 --warmup_iters 2

stage quiz "choose one of four answers, as in C-Eval"
python eval_ceval.py --weights $out/full_sft_192.pth --data_dir dataset/sample/ceval --out_dir $out/ceval --score text --device cpu

stage chat "look at the result"
python 2-eval.py --auto --weights $out/rl_192.pth --device cpu --max_new_tokens 40

stage export "write a folder that transformers can load"
python export_model.py --weights $out/rl_192.pth --output $out/minimind-toy --overwrite

stage vision "learn to see, from pictures with captions and questions"
vision="$common --out_dir $out/vision --optimizer muon --batch_size 4 --warmup_iters 4 --val_fraction 0"
python 8-pretrain_vlm.py $vision --init_from $out/full_sft_192.pth --data_path dataset/sample/vlm_pretrain.parquet \
    --freeze none --learning_rate 1e-2 --max_steps 260
python 9-sft_vlm.py $vision --data_path dataset/sample/vlm_sft.parquet --learning_rate 3e-3 --max_steps 180
python eval_vlm.py --out_dir $out/vision --device cpu

stage report "measure what was learned"
python bench/quickstart_report.py --out_dir $out
echo "The whole pipeline took $((SECONDS / 60)) min $((SECONDS % 60)) s. To chat with the model, first run: . .venv/bin/activate"
echo "Then, in the terminal: python 2-eval.py --out_dir $out"
echo "or on a web page: streamlit run fast_inference.py -- --out_dir $out"
