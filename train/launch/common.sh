# Functions of the launchers. Source this file after setting ROOT to the repository's root.

GPU=${GPU:-H100} # a GPU name that recurrent-db plan knows

# $1 is the launcher's own first argument. `shift` removes it for the launcher too.
dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

PYTHON=${PYTHON:-python}
PRETRAIN=$ROOT/train/pretrain.py

# Report a mistake of the user in one line, and exit with status 2: fail MESSAGE
fail() {
  echo "error: $*" >&2
  exit 2
}

# Fail unless VALUE is a whole number above 0: need_count NAME VALUE
need_count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a whole number above 0, got '$2'"
}

# Print the plan for GPUS GPUs and the trainer's arguments: show_plan GPUS CONFIG [options]
# --resume and --overwrite are left out, because they do not change the plan.
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

# Print a command, quoted so that it can be pasted into a shell: show_command WORD...
show_command() {
  echo "would run:"
  printf ' %q' "$@"
  echo
}
