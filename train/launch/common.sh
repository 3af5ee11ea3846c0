# What the launchers share; sourced, not run. They set ROOT (this repository).

GPU=${GPU:-H100} # a name of the plan's table

# Sourced without arguments of its own, so this is the launcher's first one, and it is gone for the launcher too.
dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

PYTHON=${PYTHON:-python}
PRETRAIN=$ROOT/train/pretrain.py

# A user's mistake is one line and status 2.
fail() {
  echo "error: $*" >&2
  exit 2
}

# A whole number above zero, or a mistake: need_count NAME VALUE
need_count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a whole number above 0, got '$2'"
}

# The plan for so many GPUs, from the arguments that the trainer would get: show_plan GPUS CONFIG [options]
# --resume and --overwrite say what becomes of a run directory, and nothing about a step.
show_plan() {
  local gpus=$1 words=() word previous=
  shift
  for word in "$@"; do
    [[ $word == --resume || $word == --overwrite || ($word == last-good && $previous == --resume) ]] || words+=("$word")
    previous=$word
  done
  "$PYTHON" -m recurrent_db plan "${words[@]}" --gpus "$gpus" --gpu "$GPU" || exit $?
  echo
}

# The exact command, quoted so that it can be pasted: show_command WORD...
show_command() {
  echo "would run:"
  printf ' %q' "$@"
  echo
}
