#!/usr/bin/env bash
# Run all measurements that need a GPU: speed, memory, and the GPU tests.
#
#   benchmarks/gpu.sh [--dry-run] [STEP...]      steps: sdpa compiled flex flash documents memory float8 tests; all by default
#
# Writes OUT/STEP.json and OUT/STEP.log (OUT: benchmarks/results/gpu). If a step fails or exceeds its time limit, the others
# still run; the last line then names the failed steps, and the exit status is 1. The limits add up to less than 26 minutes.
# Nothing is downloaded. WHEELS may name a folder of unpacked pure-Python packages (as from `pip install --target`) or of
# wheels without compiled parts. --dry-run runs the same commands on the CPU in small sizes that take seconds, without
# compilation and without the Llama.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
OUT="${OUT:-$root/benchmarks/results/gpu}"
dry=""
if [ "${1:-}" = "--dry-run" ]; then
    dry=yes
    shift
fi
known="sdpa compiled flex flash documents memory float8 tests"
steps=("$@")
[ "${#steps[@]}" -gt 0 ] || read -ra steps <<<"$known"
for name in "${steps[@]}"; do
    case " $known " in
    *" $name "*) ;;
    *)
        echo "error: unknown step '$name'; choose from: $known" >&2
        exit 2
        ;;
    esac
done
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"

path="$root"
if [ -n "${WHEELS:-}" ]; then
    path="$path:$WHEELS"
    for wheel in "$WHEELS"/*.whl; do # Python can import pure packages from a wheel file
        [ ! -e "$wheel" ] || path="$path:$wheel"
    done
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$root"

missing=()
for package in torch numpy tyro sentencepiece safetensors tqdm matplotlib transformers pytest; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "missing: ${missing[*]}; put them into a folder and set WHEELS=FOLDER" >&2
fi
lacks() { # lacks PACKAGE...: whether any of them is missing
    local package
    for package in "$@"; do
        case " ${missing[*]-} " in *" $package "*) return 0 ;; esac
    done
    return 1
}
if lacks torch numpy tyro sentencepiece safetensors tqdm; then
    echo "error: no step can run without these packages" >&2
    exit 2
fi

failed=()
step() { # step NAME SECONDS COMMAND...: run it if it was asked for
    local name="$1" limit="$2" status=0 start=$SECONDS
    shift 2
    echo "$name: $*"
    timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
    if [ "$name" = tests ] && [ "$status" -eq 5 ]; then
        echo "  no test is marked gpu"
        status=0
    fi
    [ "$status" -ne 124 ] || echo "  stopped after $limit s"
    echo "  exit $status, $((SECONDS - start)) s; $OUT/$name.log"
    if [ "$status" -ne 0 ]; then
        failed+=("$name")
        tail -n 3 "$OUT/$name.log"
    fi
}
skip() { # skip NAME REASON
    echo "$1: skipped: $2" | tee "$OUT/$1.log"
}
has() { # has PYTHON-IMPORT: whether the import works
    "$python" -c "$1" >/dev/null 2>&1
}

speed=("$python" benchmarks/speed/training.py --device cuda)
some="next_token,denoise-two-stream" # back ends differ in these: one stream, two streams
memory=("$python" benchmarks/speed/memory.py --device cuda --config train/configs/pythia-70m-looped.toml --batch-size 64)
documents=("$python" benchmarks/speed/documents.py --device cuda --config train/configs/pythia-70m-looped.toml)
float8=("$python" benchmarks/speed/float8.py --device cuda)
if lacks transformers || [ -n "$dry" ]; then
    speed+=(--no-reference)
fi
if [ -n "$dry" ]; then
    export TORCH_COMPILE_DISABLE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    speed+=(--device cpu --quick --repetitions 1 --warmup 1 --seconds 0.01 --objectives next_token)
    memory=("$python" benchmarks/speed/memory.py --batch-size 1 --repetitions 1)
    documents=("$python" benchmarks/speed/documents.py --batch-size 1 --pairs 2)
    float8=("$python" benchmarks/speed/float8.py --config train/configs/tiny.toml --tokens 64 --repetitions 1 --calls 1)
fi

for name in "${steps[@]}"; do
    case "$name" in
    sdpa)
        step sdpa 270 "${speed[@]}" --backends sdpa --json "$OUT/sdpa.json"
        ;;
    compiled)
        step compiled 450 "${speed[@]}" --backends sdpa --compile compiled --json "$OUT/compiled.json"
        ;;
    flex)
        if [ -n "$dry" ]; then
            skip flex "FlexAttention trains only on a GPU"
        else
            step flex 210 "${speed[@]}" --backends flex --compile both --objectives "$some" --json "$OUT/flex.json"
        fi
        ;;
    flash)
        if [ -n "$dry" ]; then
            skip flash "flash-attn needs a GPU"
        elif has "import flash_attn_interface" || has "from flash_attn import flash_attn_func" ||
            has "from flash_attn.cute import flash_attn_func"; then
            step flash 180 "${speed[@]}" --backends flash --compile both --objectives "$some" --json "$OUT/flash.json"
        else
            skip flash "flash-attn is not installed"
        fi
        ;;
    documents)
        step documents 90 "${documents[@]}" --json "$OUT/documents.json"
        ;;
    memory)
        step memory 90 "${memory[@]}" --json "$OUT/memory.json"
        ;;
    float8)
        step float8 60 "${float8[@]}" --json "$OUT/float8.json"
        ;;
    tests)
        if lacks pytest; then
            skip tests "pytest is missing"
        else
            step tests 180 "$python" -m pytest -q -p no:cacheprovider -m gpu $(grep -rl --include="test_*.py" "mark\.gpu" tests) --junitxml "$OUT/tests.xml"
        fi
        ;;
    esac
done

if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all done: $OUT"
