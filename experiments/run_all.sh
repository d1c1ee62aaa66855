#!/usr/bin/env bash
# Every experiment on one GPU within a total time, the most important first; one small JSON file each, into OUT.
#   experiments/run_all.sh SECONDS [DATA [OUT [NAME ...]]]
#   SEEDS="0 1" experiments/run_all.sh 560 data out language genomics
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?usage: experiments/run_all.sh SECONDS [DATA [OUT [NAME ...]]]}
data=${2:-data}
out=${3:-${OUT:-runs/experiments}}
read -ra seeds <<<"${SEEDS:-0 1 2}"
exec "${PYTHON:-python3}" -u -m experiments "${@:4}" --seconds "$seconds" --data "$data" --out "$out" \
  --tokens-cache "${TMPDIR:-/tmp}/mambakit_books_tokens.npz" --seeds "${seeds[@]}"
