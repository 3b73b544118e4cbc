#!/usr/bin/env bash
# Brings what a full-size run reads into one folder, and builds the search index:
#
#   launch/prepare.sh FOLDER [--model=Qwen/Qwen2.5-7B-Instruct] [--skip-model] [--skip-corpus]
#                     [--vectors] [--dry-run]
#
# FOLDER/NAME            the model, from the Hugging Face hub, by its name there:
#                        Qwen2.5-7B-Instruct
# FOLDER/wiki-18.jsonl   Wikipedia 2018 as Search-R1 uses it: 21 million passages; 5 GB packed,
#                        14 GB unpacked
# FOLDER/wiki-18.index   its search index: hours, and tens of GB; with --vectors those of E5-base-v2,
#                        too, from Search-R1: 65 GB are fetched, and 32 kept in the index
# FOLDER/ssp             given answers and the seven question sets, from the authors of SSP
#
# With FOLDER=data these are the names in configs/qwen7b.py. Needs requirements.txt installed
# (PYTHON, default python3). What is there already is not fetched again. At the end it prints the
# keys for ssp_jax.main. --dry-run prints every command and runs none.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

act() {
  printf '%q ' "$@"
  printf '\n'
  if [[ -z $dry_run ]]; then "$@"; fi
}

dry_run="" folder="" model=Qwen/Qwen2.5-7B-Instruct with_model=yes with_corpus=yes vectors=""
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=yes ;;
    --model=*) model=${argument#*=} ;;
    --skip-model) with_model="" ;;
    --skip-corpus) with_corpus="" ;;
    --vectors) vectors=yes ;;
    -*) usage ;;
    *) [[ -z $folder ]] || usage && folder=$argument ;;
  esac
done
[[ -n $folder ]] || usage
PYTHON=${PYTHON:-python3}
# The revision that this project was checked with, and the digest of its test set.
SSP_ANSWERS=train_answers_random_hop_50000_proposer.jsonl
SSP_REVISION=ce7a0dfbc862f923ad1668a471c409b2e023b73f
SSP_TEST_SHA256=871c7b7cdec2e090e8597ef26a9a973a46aad0830bb1e016679dddd748462f50

download() { act "$PYTHON" -m huggingface_hub.cli.hf download "$@"; }

if [[ -n $with_model ]]; then
  parts=(--include '*.json' --include '*.safetensors' --include '*.txt' --include '*.model')
  parts+=(--include '*.jinja')
  download "$model" --local-dir "$folder/${model##*/}" "${parts[@]}"
fi
if [[ -n $with_corpus ]]; then
  download PeterJinGo/wiki-18-corpus wiki-18.jsonl.gz --repo-type dataset --local-dir "$folder"
  if [[ ! -f $folder/wiki-18.jsonl ]]; then act gunzip --keep "$folder/wiki-18.jsonl.gz"; fi
fi
# One file after the other: as a data set the two do not share a schema.
for file in "$SSP_ANSWERS" test.jsonl; do
  download Quark-LLM/SSP "$file" --repo-type dataset --revision "$SSP_REVISION" \
    --local-dir "$folder/ssp"
done
if [[ -z $dry_run ]]; then
  sha256sum --check --quiet <<< "$SSP_TEST_SHA256  $folder/ssp/test.jsonl"
fi
keys=(
  "--config.retriever.corpus=$folder/wiki-18.jsonl"
  "--config.retriever.index=$folder/wiki-18.index"
)
if [[ -n $with_corpus ]]; then
  # With the settings of configs/default.py, which the run must share.
  act "$PYTHON" -c '
import sys
from ssp_jax.config.command_line import parse_command_line
from ssp_jax.retriever.search import open_retriever
r = parse_command_line(sys.argv[1:]).config.retriever
open_retriever(r.corpus, r.index, stemmer=r.stemmer, stopwords=r.stopwords, k1=r.k1, b=r.b)' \
    --config=configs/default.py "${keys[@]}"
fi
if [[ -n $vectors ]]; then
  for part in part_aa part_ab; do
    download PeterJinGo/wiki-18-e5-index "$part" --repo-type dataset --local-dir "$folder"
  done
  # One file in two parts. The prefixes below are those that E5 was trained with.
  # shellcheck disable=SC2016  # expanded by the inner shell
  act bash -c 'cat "$1/part_aa" "$1/part_ab" > "$1/e5_Flat.index"' - "$folder"
  act "$PYTHON" -m ssp_jax.retriever import-faiss "--file=$folder/e5_Flat.index" \
    --encoder=intfloat/e5-base-v2 '--query_prefix=query: ' '--passage_prefix=passage: ' \
    "--out=$folder/wiki-18.index"
fi
echo "keys of a run with these files:"
printf '  %s\n' "--config.model.path=$folder/${model##*/}" \
  "--config.data.answers=$folder/ssp/$SSP_ANSWERS" \
  "--config.data.eval_sets.ssp=$folder/ssp/test.jsonl" "${keys[@]}"
