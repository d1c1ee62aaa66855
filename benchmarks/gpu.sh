#!/usr/bin/env bash
# The measurements that need NVIDIA GPUs, in pieces that end by themselves:
#
#   benchmarks/gpu.sh FOLDER PIECE [SECONDS]
#
# Each piece takes at most SECONDS (572). Logs and records go to FOLDER; a record is moved to docs/benchmarks/ by hand,
# after it was read. Run it from the repository's root, mambakit being installed.
#
#   tests     the tests that need a card
#   layers    layers and models that run eagerly, beside mamba-ssm where it is installed; torch.compile; layouts
#   drafts    speculation: 1 to 8 slots
#   packed    products of packed weights: check, beside bfloat16, tiles; FalconMamba's steps and prompts
#   context   1.4b beside the compiled Llama by context
#   formats   float8 training, fp8 generation and prompts, ways of a decode step, the server, the engine
#   sanitize  compute-sanitizer over every kernel
#   train4    four GPUs: training of 1.4b, DDP, FSDP2 and the options that exchange less
#   long4     four GPUs: a sequence of 1,048,576 tokens, four replicas
#   serve2    two GPUs: two replicas of the server
set -u
folder=${1:?a folder for the results} piece=${2:?a piece} limit=${3:-572}
began=$(date +%s)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# step NAME SECONDS COMMAND...: at most so long, and never past the piece's limit; its last lines are shown.
step() {
  local name=$1 most=$2 left=$((limit - ($(date +%s) - began))) start
  shift 2
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 20 ]; then
    echo "== $name: no time left"
    return
  fi
  start=$(date +%s)
  timeout -k 5 "$most" "$@" >"$folder/$name.log" 2>&1
  echo "== $name: exit $? after $(($(date +%s) - start)) s of $most"
  tail -n "${lines:-30}" "$folder/$name.log" | cut -c1-170
}

run() { # run NAME SECONDS PROGRAM ARGUMENTS...: a benchmark with a record of its name
  local name=$1 most=$2 program=$3
  shift 3
  step "$name" "$most" python3 "benchmarks/$program.py" "$@" --json "$folder/$name.json"
}

case $piece in
tests)
  step tests "$limit" python3 -m pytest -q -m cuda -n 16 -p no:cacheprovider
  ;;
layers)
  run eager 200 eager --paths prepared drop-in mamba-ssm --parts mixers models
  run eager-compile 120 eager --paths prepared --parts compile
  run layouts 120 layouts --device cuda
  ;;
drafts)
  run drafts 240 drafts --rows 1 8 --draft-tokens 3 5 --rounds 2
  # The same draft costs a larger model less of its round.
  run drafts-7b 240 drafts --target 7b --rows 1 8 --draft-tokens 3 5 --rounds 2
  ;;
packed)
  # The check takes some 15 s, the table 60 s; the sweep ends with the best tiles over all shapes.
  run packed-products 170 packed_products --ways ours --rows 1 8 16 32 64 128 256 512 \
    --shapes "7b in_proj" "7b out_proj" "1.4b in_proj" "1.4b out_proj"
  run packed-tiles 240 packed_products --parts none --sweep --shapes "7b in_proj" "7b out_proj" --formats int8 int4 \
    --swept-rows 8 32 64 128 512
  run falcon-mamba 170 falcon_mamba --rounds 20
  ;;
context)
  step context 560 python3 benchmarks/generation.py --parts context --context-tries 1 --contenders mambakit \
    "Llama, compiled" --contexts 8192+256 2048+128 32768+256 128+512 --json "$folder/context.json"
  # In what is left: states in bfloat16, and the Llama as it comes. The record keeps the rows above.
  step context-more 300 python3 benchmarks/generation.py --parts context --context-tries 1 --contenders \
    "mambakit, states in bfloat16" "Llama" --contexts 128+512 2048+128 --json "$folder/context.json"
  ;;
formats)
  run train-step-float8 160 train_step --only 1.4b --float8
  run generate-fp8 80 generation --parts generate --shapes 1.4b --formats plain fp8 --alone --batches 128 --prompt 2048 \
    --new 128
  run prompts-fp8 70 packed_products --parts prompts --models 1.4b --formats fp8 int8 --prompts 8x2048 1x512
  run decode-ways 130 decode_step --ways --shapes 1.4b --formats plain int8 int4 fp8 --rows 8 32 64 128 256 512 --rounds 20
  run steps 60 generation --parts step --shapes 130m 1.4b --formats plain int4 --batches 1
  run serving 100 serving --replicas 1 --random-shape 1.4b --slots 64 --temperature 1
  # More requests than slots: a text that ends makes room for one that waits, as under load.
  run serving-steady 100 serving --replicas 1 --random-shape 1.4b --slots 64 --temperature 1 --concurrency 96 \
    --requests 768
  run engine 60 generation --parts engine --shapes 1.4b --rows 64 --engine-prompt 128 --new 128
  ;;
sanitize)
  step sanitizers "$limit" python3 .ci/sanitizers.py --jobs 8 --minutes 9.2 --json "$folder/sanitizers.json"
  ;;
train4)
  run multi-gpu-training 420 multi_gpu --gpus 4 --only training --rows 4 --ways ddp "fsdp, reshard_after_forward=false" \
    "ddp, reduce_dtype=bfloat16" "fsdp, both" fsdp
  # How many of each card's multiprocessors the exchanges may take (NCCL's default is 16 to 24 and more).
  NCCL_MAX_CTAS=8 run multi-gpu-8-ctas 150 multi_gpu --gpus 4 --only training --rows 4 --ways ddp \
    "fsdp, reshard_after_forward=false"
  ;;
long4)
  run multi-gpu-context 320 multi_gpu --gpus 4 --only context --sequences 2
  run serving-4 240 serving --replicas 4 --compare --random-shape 1.4b --slots 64 --temperature 1
  ;;
serve2)
  run serving-2 230 serving --replicas 2 --compare --random-shape 1.4b --slots 64 --temperature 1
  ;;
*)
  echo "no piece $piece: $(sed -n 's/^#   \([a-z0-9]*\)  .*/\1/p' "$0" | tr '\n' ' ')" >&2
  exit 2
  ;;
esac
echo "piece $piece: $(($(date +%s) - began)) s"
