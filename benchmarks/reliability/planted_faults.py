"""Plant one-line faults in a copy of the package, and count those that the fast tests catch.

python benchmarks/reliability/planted_faults.py --json OUT

Each fault replaces one line of a core file in a copy of the repository. `pytest -m fast` then runs there and stops at the
first test that fails. Tests of the changed folder run first. The exit status is 1 if a fault was missed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import importlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass

import pytest

from benchmarks.reliability.reliability import finish
from recurrent_db.arguments import run_command
from recurrent_db.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("recurrent_db", "tests", "train", "eval", "docs", "pyproject.toml")
PRELOADED = (
    "torch._dynamo",
    "torch.utils.flop_counter",
    "torch.nn.attention.flex_attention",
    "hypothesis",
    "scipy.stats",
)
"""What the tests import and no fault changes."""
MARK = "pytestmark = pytest.mark.fast"


@dataclass
class Args:
    """Plant faults, count those that the fast tests catch."""

    only: str = ""
    """Plant only the faults whose name contains this."""
    check: bool = True
    """First run the tests without a fault: they must pass."""
    json: Path | None = None
    """File to write the result to."""


@dataclass(frozen=True)
class Fault:
    """A text in a file of the package, and what replaces it."""

    name: str
    file: str
    before: str
    after: str

    def plant(self, text: str) -> str:
        """The file with the fault. Raises `UserError` if the text is not there exactly once."""
        if text.count(self.before) != 1:
            raise UserError(
                f"fault {self.name!r}: {self.file} has {text.count(self.before)} lines {self.before!r}, not one"
            )
        return text.replace(self.before, self.after)


FAULTS = (
    Fault(
        "injection reads the context twice",
        "model/looped.py",
        "state_BTD = self.injection(state_BTD, e_BTD)\n",
        "state_BTD = self.injection(e_BTD, e_BTD)\n",
    ),
    Fault("causal mask shifted by one", "model/attention.py", "seen = there <= here", "seen = there <= here + 1"),
    Fault("attention without a causal mask", "model/attention.py", "is_causal=causal", "is_causal=False"),
    Fault(
        "packed documents see each other",
        "model/attention.py",
        "docs_BS[b, here] == docs_BS[b, there]",
        "docs_BS[b, here] == docs_BS[b, here]",
    ),
    Fault(
        "gradient of the loss without the target",
        "model/head.py",
        "torch.full_like(targets_R1, -1",
        "torch.full_like(targets_R1, 0",
    ),
    Fault("sampled depth starts at zero", "model/depth.py", '"depth/count"), tau) + 1', '"depth/count"), tau)'),
    Fault("c_skip has the wrong sign", "denoise/precond.py", "return self.sd**2 / (", "return -(self.sd**2) / ("),
    Fault(
        "c_in forgets the target's variance",
        "denoise/precond.py",
        "c_in(self, sigma: Tensor) -> Tensor:\n        return torch.rsqrt(sigma**2 + self.sd**2)",
        "c_in(self, sigma: Tensor) -> Tensor:\n        return torch.rsqrt(sigma**2)",
    ),
    Fault(
        "ratio of a walk's step inverted",
        "denoise/sampler.py",
        "ratio = sigma_next / sigma\n    return",
        "ratio = sigma / sigma_next\n    return",
    ),
    Fault("bound without one of its terms", "denoise/bound.py", ".logsumexp(-1) - own_BT", ".logsumexp(-1)"),
    Fault(
        "noise levels without the atom", "denoise/noise.py", "torch.where(u < 1 - atom,", "torch.where(u < 2 - atom,"
    ),
    Fault(
        "every sample draws the same noise",
        "rng.py",
        "key(self.seed, self.step, int(index),",
        "key(self.seed, self.step, 0,",
    ),
    Fault(
        "targets are the inputs", "data/loader.py", "tokens_BT1[:, 1:].contiguous()", "tokens_BT1[:, :-1].contiguous()"
    ),
    Fault("all epochs have one order", "data/loader.py", "self.names[number], int(e))", "self.names[number], 0)"),
    Fault(
        "shards start one token late",
        "data/shards.py",
        "begin = start - int(self.starts[shard])",
        "begin = start + 1 - int(self.starts[shard])",
    ),
    Fault(
        "likelihood averaged over the wrong axis",
        "evaluation/likelihood.py",
        "-log_p_BT.double().mean(-1)",
        "-log_p_BT.double().mean(0)",
    ),
    Fault(
        "mixture not divided by its draws",
        "evaluation/likelihood.py",
        "logsumexp(0) - math.log(len(log_p_MBT))",
        "logsumexp(0)",
    ),
    Fault("bits per byte in nats", "evaluation/likelihood.py", "(math.log(2) * n_bytes)", "n_bytes"),
    Fault("head's FLOPs left out", "accounting/flops.py", '"head": head if', '"head": Cost() if'),
    Fault("backward counted once", "accounting/cost.py", "runs = no_grad + 3 * grad", "runs = no_grad + 2 * grad"),
    Fault(
        "backward's products counted once",
        "accounting/cost.py",
        "backward_weight=grad * 2 * weights",
        "backward_weight=0.0",
    ),
    Fault(
        "unrolled backpropagates through all",
        "objectives/unrolled.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ),
    Fault(
        "one_step backpropagates through all",
        "objectives/one_step.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ),
    Fault(
        "denoise trains on targets without noise",
        "objectives/denoise.py",
        "torch.addcmul(normalised(rows_BTD), sigma_Bs[..., None], eps_BTD)",
        "normalised(rows_BTD) + 0 * eps_BTD",
    ),
    Fault(
        "norms and embeddings decay",
        "optim/optimizer.py",
        'if id(p) not in decayed], "weight_decay": 0.0}',
        'if id(p) not in decayed], "weight_decay": weight_decay}',
    ),
    Fault(
        "warm-up starts too high",
        "optim/schedule.py",
        "return progress / schedule.warmup",
        "return (progress + 0.01) / schedule.warmup",
    ),
    Fault("average forgets too fast", "optim/ema.py", "(1 - decay) * ~skip", "decay * ~skip"),
    Fault(
        "checkpoint loses the optimizer",
        "store/checkpoint.py",
        "load_optimizer_tensors(model, optimizer, checkpoint.optimizer())",
        "checkpoint.optimizer()",
    ),
    Fault(
        "checkpoint loses the average",
        "store/checkpoint.py",
        "averaged = checkpoint.weights(averaged=True)",
        "averaged = checkpoint.weights()",
    ),
    Fault(
        "positions start anew behind a cache",
        "generation/cache.py",
        "slice(self.first, self.stop)",
        "slice(0, self.stop - self.first)",
    ),
    Fault(
        "top-p keeps the unlikely",
        "generation/sampling.py",
        "keep = before <= options.top_p",
        "keep = before >= options.top_p",
    ),
)


def fast_tests(root: Path, fault: Fault | None = None) -> list[str]:
    """The files of fast tests, those of the fault's folder first."""
    files = [path for path in sorted((root / "tests").rglob("test_*.py")) if MARK in path.read_text(encoding="utf-8")]
    room = "" if fault is None else fault.file.split("/")[0]
    return [str(path) for path in sorted(files, key=lambda path: path.parent.name != room)]


def _run_here(copy: Path, files: list[str]) -> int:
    """pytest's exit status, in a process that has imported nothing of this package yet."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("recurrent_db", "benchmarks")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    os.chdir(copy)
    output = os.open(copy / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    options = ["-q", "-x", "-rfE", "-m", "fast", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*options, *files]))


def run_tests(copy: Path, fault: Fault | None = None) -> str:
    """The first test that fails in a copy, "" if all pass. Raises `UserError` if the tests do not run."""
    child = os.fork()  # with torch imported, which takes most of the time of a new process
    if child == 0:
        status = 99
        try:
            status = _run_here(copy, fast_tests(copy, fault))
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told = (copy / "output").read_text(encoding="utf-8", errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", told, re.MULTILINE)
    if status not in (0, 1) and failed is None:
        raise UserError(f"the tests do not run: {told.strip()[-2000:]}")
    return failed[1] if failed is not None else ""


def main(args: Args) -> int:
    faults = [fault for fault in FAULTS if args.only in fault.name]
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    caught_by: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name)
            else:
                shutil.copy2(ROOT / name, copy / name)
        if args.check and (failed := run_tests(copy)):
            raise UserError(f"{failed} fails without a fault")
        for fault in faults:
            path = copy / "recurrent_db" / fault.file
            text = path.read_text(encoding="utf-8")
            path.write_text(fault.plant(text), encoding="utf-8")
            caught_by[fault.name] = run_tests(copy, fault)
            path.write_text(text, encoding="utf-8")
            print(
                f"{fault.name}: {f'caught by {caught_by[fault.name]}' if caught_by[fault.name] else 'missed'}",
                flush=True,
            )
    missed = [name for name, test in caught_by.items() if not test]
    return finish({"faults": len(faults), "caught_by": caught_by, "failures": missed}, args.json, None)


if __name__ == "__main__":
    run_command(Args, main)
