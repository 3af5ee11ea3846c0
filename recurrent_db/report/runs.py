"""`Run`: the data that a report reads from a run directory. Only ``config.json`` is required."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recurrent_db.accounting.flop_count import FLOP_COLUMNS
from recurrent_db.accounting.flops import inference_cost
from recurrent_db.config import Config, config_from_json, validate
from recurrent_db.data.vocabulary import ImageClasses
from recurrent_db.errors import UserError
from recurrent_db.files import check_links, read_json
from recurrent_db.model import build_model
from recurrent_db.model.build import build_network
from recurrent_db.objectives import build_objective
from recurrent_db.optim.schedule import budget_progress, learning_rate_scale
from recurrent_db.report.curves import Array
from recurrent_db.store.metrics import read_metrics

Phase = Literal["constant", "end", "other"]

STANDARD_COLUMNS = frozenset({
    "step", "tokens", *FLOP_COLUMNS, "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "hfu", "peak_memory_bytes",
    "seconds", "energy_joules", "skipped", "spikes", "rollbacks", "peak_flops", "optimizer_share",
})  # fmt: skip
"""Columns that every objective logs. Other columns belong to an objective, except ``eval/*``, ``memory/*``, ``state/*``."""


MOST_PICTURE_BYTES = 16 << 20
"""Largest picture that a report embeds."""


def number(value: Any) -> float | None:
    """Convert a finite number to float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:  # JSON integers have no limit
        return None
    return converted if math.isfinite(converted) else None


def printable(value: object) -> str:
    """Text in which characters that a page or figure cannot show (controls, lone surrogates) are replaced by U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value))


@dataclass(frozen=True)
class Evaluation:
    """Held-out scores at one step of training."""

    step: int
    tokens: float
    flops: float
    seconds: float
    nll: dict[int, float]
    """NLL in nats per token, by K; never empty."""
    bits_per_byte: dict[int, float]
    phase: Phase
    """State of the learning rate. ``constant``: at its peak. ``end``: annealed, at the end of a complete run. ``other``:
    during warm-up or decay, or at the end of an incomplete run."""
    stretch: int
    """Number of the uninterrupted period at the peak rate. Points of different periods are not joined to one curve."""

    @property
    def best_k(self) -> int:
        return min(self.nll, key=lambda k: (self.nll[k], k))

    @property
    def best_nll(self) -> float:
        return self.nll[self.best_k]


@dataclass(frozen=True)
class DepthPoint:
    """Held-out likelihood at one K. NLL is in nats per token; FLOPs per token are for one noise draw."""

    k: int
    nll: float
    bits_per_byte: float | None
    stderr: float | None
    flops_per_token: float | None


@dataclass(eq=False)
class Run:
    """One run: its configuration and the results in its directory."""

    name: str
    path: Path
    config: Config
    raw_config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    evaluations: list[Evaluation] = field(default_factory=list)
    depth: list[DepthPoint] = field(default_factory=list)
    depth_source: str = ""
    """Description of the file or evaluation that ``depth`` comes from."""
    depth_tokens: float | None = None
    """Number of held-out tokens on which ``depth`` was scored."""
    state_rms: list[tuple[int, float]] = field(default_factory=list)
    """(iteration, root mean square per component of the state after it), in a run of the largest K that was scored."""
    state_is: Literal["state", "estimate"] = "state"
    """The quantity in ``state_rms``: the recurrent state, or a denoiser's estimate of the clean target."""
    loss_by_sigma: list[tuple[float, float]] = field(default_factory=list)
    """(sigma, held-out NLL in nats per token), by rising sigma."""
    sigma_star: float | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    lm_eval: dict[str, dict[str, Any]] = field(default_factory=dict)
    """lm-eval's results (task -> metric -> value) by K. The key is empty if the file does not give K."""
    images: dict[str, Any] = field(default_factory=dict)
    """The result of eval/images.py."""
    picture: bytes = b""
    """Samples of a generator of images, as PNG."""
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Cost of each block of a joined run, by block number."""
    notes: list[str] = field(default_factory=list)
    """Messages about files that exist but cannot be used."""

    @property
    def of_images(self) -> bool:
        """Whether the run was trained on images, not on text."""
        return self.config.model.network != "language"

    @property
    def sized(self) -> bool:
        """Whether the size of the vocabulary or of the images is known. Parameters and FLOPs follow from it."""
        return bool(self.config.model.image_size) if self.of_images else self.config.model.vocab_size > 0

    @property
    def loss_unit(self) -> str:
        return {"vit": "nats/image", "dit": "weighted squared error"}.get(self.config.model.network, "nats/token")

    def last(self, column: str) -> float | None:
        """The last number in a column of metrics.jsonl."""
        return next((v for row in reversed(self.rows) if (v := number(row.get(column))) is not None), None)

    def most(self, column: str) -> float | None:
        """The largest number in a column of metrics.jsonl."""
        return max((v for row in self.rows if (v := number(row.get(column))) is not None), default=None)

    def series(self, x: str, y: str) -> tuple[Array, Array]:
        """Two columns of metrics.jsonl, without rows where either is not a number."""
        pairs = [(a, b) for row in self.rows if None not in (a := number(row.get(x)), b := number(row.get(y)))]
        points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    @property
    def progress(self) -> float | None:
        """Spent share of the budget; None if the run has no rows or no budget."""
        return _progress(self.config, self.rows[-1]) if self.rows else None

    def progress_at(self, row: dict[str, Any]) -> float | None:
        """Spent share of the budget at a row of metrics.jsonl."""
        return _progress(self.config, row)

    @property
    def complete(self) -> bool:
        return (self.progress or 0.0) >= 1

    @property
    def training_curve(self) -> str:
        """Name of the training-loss column that is comparable with other runs. A denoiser's plain loss averages over noise
        levels, and at most of them the answer is partly visible."""
        return "loss_sigma_max" if any("loss_sigma_max" in row for row in self.rows) else "loss"

    def own_columns(self) -> list[str]:
        """Names of the numeric columns that only this objective logs."""
        names = dict.fromkeys(name for row in self.rows for name, value in row.items() if number(value) is not None)
        return [
            name
            for name in names
            if name not in STANDARD_COLUMNS and not name.startswith(("eval/", "memory/", "state/"))
        ]

    def parameters(self) -> dict[str, int] | None:
        """Number of parameters by part; None if the size of the vocabulary or of the images is not known. Networks for
        images have one entry for all."""
        if not self.sized:
            return None
        if self.of_images:
            try:
                network = build_network(self.config, None, "meta")
            except UserError:  # transformers is not installed
                return None
            return {"total": sum(p.numel() for p in network.parameters()), "noise_conditioning": 0}
        return build_model(self.config.model, seed=None, device="meta").parameter_counts()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _progress(config: Config, row: dict[str, Any]) -> float | None:
    spent = [number(row.get(name)) for name in ("flops", "tokens", "step", "seconds")]
    if any(v is None for v in spent) or all(limit is None for limit in vars(config.budget).values()):
        return None
    flops, tokens, step, seconds = (v or 0.0 for v in spent)
    return budget_progress(config.budget, flops, tokens, step, seconds)


def _by_k(row: dict[str, Any], prefix: str) -> dict[int, float]:
    found = ((re.fullmatch(re.escape(prefix) + r"(\d+)", name), number(value)) for name, value in row.items())
    return {int(match[1]): value for match, value in found if match and value is not None}


def _annealed(config: Config, rows: Sequence[dict[str, Any]], rate: float | None) -> bool:
    """Whether the run is complete and its last learning rate is at the end of its schedule. If the budget was reduced
    during the run, the run ends before its learning rate is annealed."""
    last = _progress(config, rows[-1]) or 0.0
    before = (_progress(config, rows[-2]) or 0.0) if len(rows) > 1 else 0.0
    scale = learning_rate_scale(config.schedule, min(1.0, (before + last) / 2))
    return last >= 1 and rate is not None and rate <= config.optim.lr * (scale + 0.02)


def evaluations(config: Config, rows: Sequence[dict[str, Any]]) -> list[Evaluation]:
    """Rows of metrics.jsonl with held-out scores, each with the phase of its learning rate."""
    result: list[Evaluation] = []
    constant_schedule = config.schedule.name in ("wsd", "constant")
    stretch = 0
    for row in rows:
        rate = number(row.get("lr"))
        constant = constant_schedule and rate is not None and math.isclose(rate, config.optim.lr, rel_tol=1e-6)
        constant = constant and number(row.get("depth")) != 0  # depth 0: the skip-core phase
        if not constant:
            stretch += 1
        nll = _by_k(row, "eval/nll_k")
        at = [number(row.get(name)) for name in ("step", "tokens", "flops", "seconds")]
        if not nll or any(v is None for v in at):
            continue
        step, tokens, flops, seconds = (v or 0.0 for v in at)
        phase: Phase = "other"
        if constant:
            phase = "constant"
        elif row is rows[-1] and _annealed(config, rows, rate):
            phase = "end"
        bits = _by_k(row, "eval/bits_per_byte_k")
        result.append(Evaluation(int(step), tokens, flops, seconds, nll, bits, phase, stretch))
    return result


def _read_json(path: Path, kind: type, notes: list[str]) -> Any:
    """Read a JSON value of type ``kind``. Returns an empty one if the file is missing or, with a note, if it is wrong."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError):
        notes.append(f"{path.name} could not be read and is left out")
        return kind()
    if not isinstance(value, kind):
        notes.append(f"{path.name} has an unexpected content and is left out")
        return kind()
    return value


def _read_depth(run: Run, curve: dict[str, Any]) -> None:
    """Set NLL by K from the depth curve, or else from the last evaluation during training."""
    by_k = curve.get("by_k")
    for key, score in by_k.items() if isinstance(by_k, dict) else ():
        if not str(key).isdecimal() or not isinstance(score, dict) or (nll := number(score.get("nll"))) is None:
            continue
        extra = [number(score.get(name)) for name in ("bits_per_byte", "stderr", "flops_per_token")]
        run.depth.append(DepthPoint(int(key), nll, *extra))
    if run.depth:
        run.depth_tokens, draws = number(curve.get("tokens")), number(curve.get("draws"))
        size = f" on {run.depth_tokens:,.0f} held-out tokens" if run.depth_tokens else ""
        run.depth_source = f"depth_curve.json{size}" + (f", {draws:.0f} noise draws" if draws and draws > 1 else "")
    elif run.evaluations:
        last = run.evaluations[-1]
        run.depth_tokens = run.last("eval/tokens")
        recurrence = build_objective(run.config).recurrence
        for k, nll in last.nll.items():
            cost = None
            if run.config.model.vocab_size:
                cost = inference_cost(run.config.model, run.config.data.sequence_length, recurrence.passes(k))
            run.depth.append(DepthPoint(k, nll, last.bits_per_byte.get(k), None, cost))
        run.depth_source = f"the last evaluation during training (step {last.step:,})"
    run.depth.sort(key=lambda point: point.k)


def _read_state(run: Run, curve: dict[str, Any]) -> None:
    """Set the size of the state by iteration."""
    table = curve.get("state_rms_by_iteration")
    for key, value in table.items() if isinstance(table, dict) else ():
        if str(key).isdecimal() and (rms := number(value)) is not None and rms >= 0:
            run.state_rms.append((int(key), rms))
    run.state_rms.sort()
    run.state_is = "estimate" if curve.get("state_is") == "estimate" else "state"


def _read_sigma(run: Run, report: dict[str, Any]) -> None:
    """Set the loss by noise level, from a dict {sigma: NLL} or a list of objects."""
    table = report.get("nll_by_sigma")
    pairs: list[tuple[Any, Any]] = []
    if isinstance(table, dict):
        pairs = list(table.items())
    elif isinstance(table, list):
        pairs = [(entry.get("sigma"), entry.get("nll")) for entry in table if isinstance(entry, dict)]
    for sigma, nll in pairs:
        try:
            at, value = number(float(sigma)), number(nll)
        except (TypeError, ValueError):
            continue
        if at is not None and at > 0 and value is not None:
            run.loss_by_sigma.append((at, value))
    run.loss_by_sigma.sort()
    run.sigma_star = number(report.get("sigma_star"))


def _read_blocks(run: Run, values: dict[str, Any]) -> None:
    """Set the blocks of a joined run. Without a denoiser report, the loss by sigma comes from the blocks' own runs."""
    table = values.get("blocks")
    run.blocks = {str(k): v for k, v in table.items() if isinstance(v, dict)} if isinstance(table, dict) else {}
    if not run.loss_by_sigma and not run.of_images:
        for block in run.blocks.values():
            _read_sigma(run, {"nll_by_sigma": block.get("loss_by_sigma"), "sigma_star": run.sigma_star})


def _read_lm_eval(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's tables by K, from a file with one table per K or from the harness's own file."""
    by_k = values.get("by_k")
    if isinstance(by_k, dict):
        tables = {str(k): v.get("results", v) for k, v in by_k.items() if isinstance(v, dict)}
    else:
        config = values.get("config")
        arguments = config.get("model_args", "") if isinstance(config, dict) else ""
        if isinstance(arguments, dict):
            k = str(arguments.get("k", ""))
        else:
            match = re.search(r"(?:^|,)\s*k=(\d+)", str(arguments))
            k = match[1] if match else ""
        tables = {k: values.get("results")}
    return {k: table for k, table in tables.items() if isinstance(table, dict)}


def _read_images(run: Run) -> None:
    """Set the size of a run's images, and the result and picture of eval/images.py."""
    model = run.config.model
    for found in sorted(run.path.glob(f"checkpoints/step-*/{ImageClasses.file_name}"), reverse=True)[:1]:
        try:
            images = ImageClasses.from_bytes(found.read_bytes())
            model.image_size, model.n_classes = list(images.size), len(images.classes)
            validate(run.config)
        except (OSError, UserError):
            model.image_size, model.n_classes = [], 0
            run.notes.append(f"{found.name} of {found.parent.name} could not be read, so its FLOPs are left out")
    run.images = _read_json(run.path / "eval" / "images.json", dict, run.notes)
    picture = run.path / "eval" / "images.png"
    try:
        small = picture.stat().st_size <= MOST_PICTURE_BYTES
        run.picture = picture.read_bytes() if small else b""
    except FileNotFoundError:
        return
    except OSError:
        small = False
    if not small or not run.picture.startswith(b"\x89PNG\r\n\x1a\n"):
        run.picture = b""
        run.notes.append(f"{picture.name} is not a PNG of at most {MOST_PICTURE_BYTES >> 20} MiB and is left out")


def read_run(path: Path, name: str) -> Run:
    """Read one run directory. Raises `UserError` if it is not a run directory or contains a link to the outside."""
    if not path.exists():
        raise UserError(f"no run directory {path}")
    check_links(path)
    source = path / "config.json"
    try:
        text = source.read_text(encoding="utf-8")
        config = config_from_json(text, str(source))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a run directory (no config.json)") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"cannot read {source}: {error}") from None
    except UserError as error:
        raise UserError(f"{path} is not a run of this version: {error}") from None
    notes: list[str] = []
    try:
        rows = [row for row in read_metrics(path / "metrics.jsonl") if isinstance(row, dict)]
    except FileNotFoundError:
        rows = []
    except (OSError, UnicodeDecodeError):
        rows = []
        notes.append("metrics.jsonl could not be read and is left out")
    environment = _read_json(path / "environment.json", dict, notes)
    run = Run(name, path, config, json.loads(text), environment, rows, notes=notes)
    if run.of_images:
        _read_images(run)
    else:
        run.evaluations = evaluations(config, rows)
    curve = _read_json(path / "eval" / "depth_curve.json", dict, notes)
    _read_depth(run, curve)
    _read_state(run, curve)
    _read_sigma(run, _read_json(path / "eval" / "denoiser_report.json", dict, notes))
    _read_blocks(run, _read_json(path / "blocks.json", dict, notes))
    run.lm_eval = _read_lm_eval(_read_json(path / "eval" / "lm_eval.json", dict, notes))
    samples = _read_json(path / "eval" / "samples.json", list, notes)
    run.samples = [sample for sample in samples if isinstance(sample, dict)]
    return run


def run_names(paths: Sequence[Path]) -> list[str]:
    """Names of the runs: the shortest ends of their paths that differ. Equal paths are numbered."""
    parts = [[printable(part) for part in path.resolve().parts] for path in paths]
    names = [""] * len(paths)
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    names = [p[-1] for p in parts]
    return [f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, in the given order.

    Raises:
        UserError: see `read_run`; or the samples of two runs were scored under different extractors.
    """
    runs = [read_run(path, name) for path, name in zip(paths, run_names(paths), strict=True)]
    under: dict[str, str] = {}
    for run in runs:
        if isinstance(distance := run.images.get("distance"), dict):
            under.setdefault(str(distance.get("extractor")), run.name)
    if len(under) > 1:
        (first, one), (second, other) = list(under.items())[:2]
        raise UserError(
            f"{one} and {other} were scored under different extractors ({first[:12]} and {second[:12]}), so their distances"
            " are not comparable: score them again under one"
        )
    return runs


def merge_baselines(paths: Sequence[Path], given: dict[str, float] | None) -> dict[str, float]:
    """Reference NLLs in nats per token: those in ``given``, then those in ``baselines.json`` beside each run."""
    merged = {printable(name): nll for name, nll in (given or {}).items()}
    for path in paths:
        for name, value in _read_json(path.resolve().parent / "baselines.json", dict, []).items():
            if (nll := number(value)) is not None:
                merged.setdefault(printable(name), nll)
    return merged
