#!/bin/sh
# What only a GPU can show, most valuable first: tests, training, kernels, an iteration of FLUX.1-dev's size.
#
#     benchmarks/gpu.sh [STEP ...]      the steps named, or all of them, in 25 minutes at most
#
# Every step has a time limit and a log of its own, and none stops another. What passed and what failed is
# added to benchmarks/results/<gpu>.txt; the benchmarks write their figures beside it, each as soon as it is measured. Nothing is
# fetched: PYTHON (default python3) has what pyproject.toml lists, its dev tools too; the package is installed from this
# folder, its extension with it. LOGS (default runs/gpu) keeps logs, runs and profiles. COMMIT names the commit where
# this folder is a copy without git.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LOGS=${LOGS:-runs/gpu}
COMMIT=${COMMIT:-$(git describe --always --dirty 2> /dev/null || echo unknown)}
export COMMIT TRITON_INTERPRET=0
ASKED=" ${*:-all} "
FAILED=0
mkdir -p "$LOGS"
TABLE=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())') || exit 1
TABLE=benchmarks/results/$TABLE.txt
"$PYTHON" - >> "$TABLE" << 'END'
import datetime, os, platform, torch, triton
print(f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}, triton "
      f"{triton.__version__}, CUDA {torch.version.cuda}; commit {os.environ['COMMIT']}, {datetime.date.today()}")
END

# step NAME SECONDS COMMAND...: unless others were asked for. The last line of its log goes into the table.
step() {
  name=$1 limit=$2
  shift 2
  case $ASKED in *" all "* | *" $name "*) ;; *) return ;; esac
  start=$(date +%s)
  timeout --kill-after 10 "$limit" "$@" > "$LOGS/$name.log" 2>&1
  case $? in 0) said=passed ;; 124 | 137) said="cut off" FAILED=1 ;; *) said=failed FAILED=1 ;; esac
  last=$(grep -v '^ *$' "$LOGS/$name.log" | tail -n 1 | cut -c 1-120)
  printf '%-16s %-8s %4d s   %s\n' "$name" "$said" "$(($(date +%s) - start))" "$last" | tee -a "$TABLE"
}

train() { # NAME RUN SETTING...: Shapes, with a checkpoint and an evaluation at the third iteration
  name=$1 run=$2
  shift 2
  step "$name" 180 "$PYTHON" -m egrpo_fast.cli train shapes --num_gpus 1 checkpoint.every=3 evaluation.every=3 \
    output_dir="$LOGS/runs/$run" "$@"
}

tests() { # NAME FOLDER...: a crash of the device costs one process of several
  name=$1
  shift
  step "$name" 300 "$PYTHON" -m pytest -n 4 --dist loadfile -m gpu --tb short -q -rfE "$@"
}

bench() { # NAME SECONDS CHOICE
  step "$1" "$2" "$PYTHON" -m pytest benchmarks -o python_files='*.py' -m '' -q --tb short --write-results -k "$3" \
    --benchmark-columns=min,median,max
}

step install 300 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
tests kernels tests/kernels
tests extension tests/extension tests/test_rollout.py
train float32 float32 iterations=3
train bfloat16 bfloat16 iterations=3 model.dtype=bfloat16
train resume float32 iterations=4 resume=true
bench 720px 240 720px-1
# A quarter of the steps and two thirds of the samples of the recipe: the same calls, fewer of them.
FLUX="--model flux schedule.num_steps=4 rollout.group_size=8 rollout.max_rows_per_call=16"
step flux 300 "$PYTHON" benchmarks/iteration.py --rounds 1 --leave-out naive --leave-out batched $FLUX
step profile 200 "$PYTHON" benchmarks/iteration.py --profile "$LOGS/profile" $FLUX
bench larger 300 "not 720px-1"
exit $FAILED
