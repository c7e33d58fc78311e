#!/usr/bin/env bash
# Pairs, then all students of these recipes, each exported and measured as soon as it is trained.
#   recipes/students/all.sh OUT [cpu|cuda]
# Two trainings run at once (JOBS); PAIRS, and per method further settings, can be changed: PAIRS=16384 SETTINGS="images=100000".
# It goes on where it was stopped: a run that has begun is resumed, one that was exported is left.
set -euo pipefail
out=$1 device=${2:-cpu}
jobs=${JOBS:-2} pairs=${PAIRS:-49152} settings=${SETTINGS:-}
export PYTHONUNBUFFERED=1
mkdir -p "$out/log"

train() { # name, method, recipe, settings
    local name=$1 method=$2 recipe=$3 run="$out/$1"
    shift 3
    [ -d "$out/export-$name" ] && return
    if compgen -G "$run/checkpoints/images-*" > /dev/null; then
        python -m diffaccel distill resume "$run"
    else
        # shellcheck disable=SC2086
        python -m diffaccel distill "$method" "recipes/students/$recipe.yaml" run="$run" pairs="$out/pairs" "$@" $settings
    fi >> "$out/log/$name.txt" 2>&1
    python -m diffaccel distill export "$run" "$out/export-$name" >> "$out/log/$name.txt" 2>&1
    echo "$name: exported after $SECONDS s"
}

python -m diffaccel distill pairs tiny-fashion-dit --out "$out/pairs" --n "$pairs" --steps 16 --guidance 1.5 \
    --device "$device" --batch 512
list=(
    "2rf rectified-flow dit-2rf"
    "slimflow slimflow dit-slimflow"
    "phased-dmd phased-dmd dit-phased-dmd"
    "dmd2 dmd2 dit-dmd2"
    "dmd2-1step dmd2 dit-dmd2-1step"
    "msd msd dit-msd"
    "2rf-uniform rectified-flow dit-2rf options.density=uniform"
    "slimflow-constant slimflow dit-slimflow options.anneal=constant"
)
for words in "${list[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
    # shellcheck disable=SC2086
    train $words &
done
wait
rows=()
for words in "${list[@]}"; do
    name=${words%% *}
    [ -d "$out/export-$name" ] || continue
    case $name in
        2rf*) steps=1,2,4 ;;
        slimflow* | dmd2-1step | msd) steps=1 ;;
        *) steps=4 ;;
    esac
    rows+=("$name=$out/export-$name:$steps")
done
python benchmarks/students.py measure "${rows[@]}" --device "$device" --work "$out/measured"
python benchmarks/students.py tables
