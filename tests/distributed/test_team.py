"""Several processes: the same run as one, few collectives, checkpoints for any number of processes, clear mistakes."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import many
import pytest
import torch
import torch.distributed as dist
from dist_runs import assert_equal, curve, everything, largest_difference, rows, train, words
from helpers import batch, micro_config

import recurrent_db
from recurrent_db.commands.train import arguments
from recurrent_db.config import ParallelConfig, load_config
from recurrent_db.data import prefetch
from recurrent_db.distributed.team import Team, local
from recurrent_db.errors import UserError
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.optim.ema import EMA
from recurrent_db.optim.optimizer import build_optimizer, step_unless
from recurrent_db.rng import Rng
from recurrent_db.store.checkpoint import Checkpoint, build_saver, load_checkpoint, save_checkpoint
from recurrent_db.store.folder import fault, find_checkpoint
from recurrent_db.store.run_directory import after_restart
from recurrent_db.store.train_state import TrainState
from recurrent_db.training import trainer

LLAMA = ["--model.layer", "llama", "--model.n_kv_heads", "1", "--model.qk_norm", "true", "--model.tied", "false"]
KINDS = {
    "next_token": ["--objective.name", "next_token"],
    "unrolled": ["--objective.name", "unrolled"],
    "one_step": ["--objective.name", "one_step", "--objective.one_step.next_token_share", "0.3"],
    "carried": ["--objective.name", "one_step", "--objective.one_step.next_token_share", "0.3",
                "--objective.one_step.state", "carried"],
    "denoise": ["--objective.name", "denoise"],
    "denoise_paper": ["--objective.name", "denoise_paper"],
    "llama": ["--objective.name", "one_step", *LLAMA],
    "neox": ["--objective.name", "denoise", "--objective.denoise.conditioning", "two-stream", "--model.layer", "neox"],
    "two-stream": ["--objective.name", "denoise", "--objective.denoise.conditioning", "two-stream"],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One run, whoever computes it


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one process, each made once."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(kind: str, steps: int) -> Path:
        name = f"{kind}-{steps}"
        if name not in made:
            made[name] = train(data, folder / name, *KINDS[kind], "--budget.steps", steps, "--optim.ema_decay", 0.9)
        return made[name]

    return run


@pytest.mark.parametrize(("kind", "mode"),
    [("unrolled", "ddp"), ("unrolled", "fsdp"), ("two-stream", "fsdp"), ("one_step", "ddp"),
     ("one_step", "fsdp"), ("carried", "ddp"), ("carried", "fsdp"), ("denoise", "fsdp"),
     ("llama", "ddp"), ("llama", "fsdp"), ("neox", "fsdp")])  # fmt: skip
def test_two_processes_train_what_one_does(data: Path, tmp_path: Path, alone: Any, kind: str, mode: str) -> None:
    # Micro-batches too, where an objective learns from all of them.
    more = ["--data.micro_batch_size", 1] if kind == "denoise" else []
    options = [*KINDS[kind], "--budget.steps", 6, "--optim.ema_decay", 0.9, "--parallel.mode", mode, *more]
    run = train(data, tmp_path / "run", *options, world=2)
    assert curve(run) == pytest.approx(curve(alone(kind, 6)), rel=1e-4)
    for key in ("tokens", "flops", "flops_update", "lr", "skipped", "depth", "eval/tokens"):
        assert [row.get(key) for row in rows(run)] == [row.get(key) for row in rows(alone(kind, 6))], key


def test_a_process_without_validation_data_does_not_block_the_others(data: Path, tmp_path: Path) -> None:
    """One validation sequence for two processes: one of them makes passes of the model that the other does not make."""
    few = ["--eval.tokens", 32, "--budget.steps", 6]
    one = train(data, tmp_path / "one", *KINDS["unrolled"], *few)
    two = train(data, tmp_path / "two", *KINDS["unrolled"], *few, "--parallel.mode", "fsdp",
                "--parallel.timeout", 60, world=2)  # fmt: skip
    assert curve(two) == pytest.approx(curve(one), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_nccl_trains_what_no_process_group_does(data: Path, tmp_path: Path, mode: str) -> None:
    options = ["--objective.name", "one_step", "--budget.steps", 6, "--run.device", "cuda", "--run.dtype", "float32"]
    for name in ("none", mode):
        more = words(data, tmp_path / name, *options, "--parallel.mode", name)
        many.run(tmp_path / f"logs-{name}", 1, many.train, more)
    assert curve(tmp_path / mode) == pytest.approx(curve(tmp_path / "none"), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_fifty_steps_agree_within_a_ten_thousandth(
    data: Path, tmp_path: Path, alone: Any, mode: str, kind: str, world: int
) -> None:
    options = [*KINDS[kind], "--budget.steps", 50, "--optim.ema_decay", 0.9, "--parallel.mode", mode]
    run = train(data, tmp_path / "run", *options, world=world)
    difference = largest_difference(run, alone(kind, 50))
    print(f"{kind} {mode} {world}: {difference:.2g}")
    assert difference < 1e-4


@pytest.mark.long
def test_hybrid_sharding_trains_what_one_process_does(data: Path, tmp_path: Path, alone: Any) -> None:
    """Two copies of the model on two processes each."""
    options = [*KINDS["unrolled"], "--budget.steps", 6, "--optim.ema_decay", 0.9, "--parallel.mode", "fsdp"]
    run = train(data, tmp_path / "run", *options, "--parallel.shard_size", 2, world=4)
    assert curve(run) == pytest.approx(curve(alone("unrolled", 6)), rel=1e-4)
    whole, part = (rows(r)[-1]["memory/parameters_bytes"] for r in (alone("unrolled", 6), run))
    assert part == pytest.approx(whole / 2, rel=0.02)
    saved, expected = everything(run), everything(alone("unrolled", 6))
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-4)


@pytest.mark.long
def test_shards_in_half_precision_follow_whole_ones(data: Path, tmp_path: Path) -> None:
    options = [
        "--objective.name",
        "denoise",
        "--budget.steps",
        8,
        "--optim.lr",
        "1e-2",
        "--run.dtype",
        "bfloat16",
    ]
    one = train(data, tmp_path / "one", *options)
    two = train(data, tmp_path / "two", *options, "--parallel.mode", "fsdp", world=2)
    assert curve(two) == pytest.approx(curve(one), rel=0.03)
    assert {t.dtype for t in everything(two).values()} == {torch.float32}


def one_bad_loss(words: list[str]) -> None:
    """The trainer, where the last process's loss is not finite at the third step."""
    original = trainer.build_objective

    def build(config: Any) -> Any:
        inner = original(config)

        class Broken(type(inner)):  # type: ignore[misc]
            def __call__(self, model: Any, batch: Any, rng: Any, progress: float) -> Any:
                loss, metrics = super().__call__(model, batch, rng, progress)
                bad = rng.step == 2 and os.environ["RANK"] == "1"
                return loss * (math.nan if bad else 1), metrics

        inner.__class__ = Broken
        return inner

    trainer.build_objective = build
    assert trainer.train(*arguments(words)) == 0


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_number_that_is_not_finite_anywhere_skips_the_step_everywhere(data: Path, tmp_path: Path, mode: str) -> None:
    options = ["--objective.name", "next_token", "--budget.steps", 5, "--parallel.mode", mode]
    many.run(tmp_path / "logs", 2, one_bad_loss, words(data, tmp_path / "run", *options))
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in everything(tmp_path / "run").values())


def test_each_process_reads_its_own_samples(data: Path) -> None:
    """Together those of one process, in its order."""
    from recurrent_db.data import Loader, open_data

    loader = Loader(open_data(data, "train"), 32, 12, seed=0)
    cpu = torch.device("cpu")
    whole = prefetch(loader, 5, 12, cpu)
    parts = [prefetch(loader, 5, 2, cpu, rank=rank, world=3) for rank in range(3)]
    for _ in range(3):
        expected = [i for micro in next(whole) for i in micro.sample_index_B.tolist()]
        assert [i for part in parts for micro in next(part) for i in micro.sample_index_B.tolist()] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def count_collectives(result: str, cases: list[tuple[str, int, str, int]]) -> None:
    """Write how many gathers, reduce-scatters and sums a step has in each case: objective, K, how it is sharded,
    micro-batches."""
    counts = []
    team = Team.join(ParallelConfig(mode="fsdp"), torch.device("cpu"))
    for name, k, wrapping, micro_batches in cases:
        config = micro_config("--objective.name", name, "--objective.unrolled.mean_depth", k,
                              "--objective.unrolled.truncation", 0, "--parallel.mode", "fsdp")  # fmt: skip
        config.model.vocab_size = 61
        model, objective = build_model(config.model, 0), build_objective(config)
        if name == "unrolled":
            objective._depth = lambda rng, k=k: (k // 2, k - k // 2)  # type: ignore[attr-defined]
        if name == "one_step":
            objective._depth = lambda rng, progress, k=k: k  # type: ignore[attr-defined]
        if wrapping == "blocks":
            from torch.distributed.fsdp import fully_shard

            for block in model.core.blocks:
                fully_shard(block)
        team.wrap(model, config, bfloat16=False)
        optimizer = build_optimizer(model, config.optim)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for number in range(1, micro_batches + 1):
                with team.micro_batch(model, last=number == micro_batches):
                    micro = batch(2, start=2 * team.rank)
                    loss, _ = team.forward(lambda: objective(model, micro, Rng(0, 0), 0.0))  # noqa: B023
                    team.backward(loss)
            norm = team.clip(model, 1.0)
            step_unless(~torch.isfinite(norm), optimizer)
            optimizer.zero_grad(set_to_none=True)
        assert bool(torch.isfinite(norm))
        found: dict[str, int] = {}
        for event in profile.events():
            if event.name.startswith("c10d::"):
                found[event.name] = found.get(event.name, 0) + 1
        counts.append(found)
    if team.first:
        Path(result).write_text(json.dumps(counts))
    team.leave()


def test_the_core_is_gathered_once_for_all_iterations(tmp_path: Path) -> None:
    cases = [("unrolled", 1, "core", 1), ("unrolled", 8, "core", 1), ("unrolled", 1, "blocks", 1),
             ("unrolled", 8, "blocks", 1), ("denoise", 1, "core", 1), ("denoise", 8, "core", 1),
             ("one_step", 2, "core", 1), ("one_step", 8, "core", 1), ("unrolled", 8, "core", 3)]  # fmt: skip
    many.run(tmp_path / "logs", 2, count_collectives, str(tmp_path / "counts"), cases)
    counts = json.loads((tmp_path / "counts").read_text())
    gathers = [sum(n for name, n in found.items() if "allgather" in name) for found in counts]
    scatters = [sum(n for name, n in found.items() if "reduce_scatter" in name) for found in counts]
    totals = [sum(found.values()) for found in counts]
    print(dict(zip(map(str, cases), counts, strict=True)))
    assert abs(totals[1] - totals[0]) <= 0.1 * totals[0]
    assert totals[4] == totals[5] and totals[6] == totals[7]
    # Three micro-batches exchange their gradients once.
    assert 0 < scatters[8] == scatters[1]
    # The counter sees what a wrapping of single blocks costs: 8 iterations of two blocks, forward.
    assert gathers[3] - gathers[1] >= 8 * 2


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_both_ways(data: str, sharded: str, whole: str) -> None:
    """Train two steps on shards; write them as shards, and gathered into one file each."""
    from recurrent_db.data import load_tokenizer

    team = Team.join(ParallelConfig(mode="fsdp"), torch.device("cpu"))
    tokenizer = load_tokenizer(data)
    config = micro_config("--parallel.mode", "fsdp", "--model.d_mlp", 49)  # divides by nothing
    config.model.vocab_size = tokenizer.vocab_size
    model, objective = build_model(config.model, 0), build_objective(config)
    team.wrap(model, config, bfloat16=False)
    optimizer, ema, state = build_optimizer(model, config.optim), EMA(model, 0.9), TrainState(step=2)
    for step in range(2):
        with team.micro_batch(model, last=True):
            micro = batch(2, start=2 * team.rank)
            team.backward(team.forward(lambda: objective(model, micro, Rng(0, step), 0.0))[0])  # noqa: B023
        step_unless(torch.zeros((), dtype=torch.bool), optimizer)
        ema.update(model, torch.zeros((), dtype=torch.bool))
        optimizer.zero_grad(set_to_none=True)
    saver = build_saver(team, Path(sharded), config, tokenizer)
    saver.save(model, optimizer, ema, state, objective.state_dict())
    for parameter in model.parameters():  # what is written is the state of the moment, however long writing takes
        local(parameter.detach()).zero_()
    saver.finish()
    load_checkpoint(Checkpoint(find_checkpoint(Path(sharded))), model, optimizer, ema)
    gathered = build_model(config.model, 0)
    full = build_optimizer(gathered, config.optim)
    average = EMA(gathered, 0.9)
    with torch.no_grad():
        for name, parameter in gathered.named_parameters():
            shard = dict(model.named_parameters())[name]
            parameter.copy_(shard.full_tensor())  # type: ignore[operator]
            average.shadow[name] = ema.shadow[name].full_tensor()  # type: ignore[operator]
            entries = optimizer.state[shard].items()
            full.state[parameter] = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in entries}
    if team.first:
        save_checkpoint(Path(whole), config, tokenizer, gathered, full, average, state, objective.state_dict())
    team.leave()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long)])
def test_shards_hold_what_whole_files_do(data: Path, tmp_path: Path, world: int) -> None:
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    many.run(tmp_path / "logs", world, save_both_ways, str(data), str(sharded), str(whole))
    assert_equal(everything(sharded), everything(whole))
    assert any(tensor.any() for name, tensor in everything(sharded).items() if "exp_avg" in name)
    names = {path.name for path in find_checkpoint(sharded).iterdir()}
    assert {name.rsplit(".", 1)[1] for name in names} == {
        "safetensors",
        "json",
        "model",
    }  # and nothing that is executed
    shards = sorted(name for name in names if name.startswith("shard-"))
    assert len(shards) == 3 * world
    model, _ = recurrent_db.load(sharded, "cpu")
    assert torch.equal(model.embedding.weight, everything(whole)["average/embedding.weight"])
    # A part that is missing, cut or altered is found out.
    folder = find_checkpoint(sharded)
    for name in (shards[0], shards[-1]):
        content = (folder / name).read_bytes()
        for damage in (None, content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
            (folder / name).unlink()
            if damage is not None:
                (folder / name).write_bytes(damage)
            assert name in str(fault(folder))
            (folder / name).write_bytes(content)
        assert fault(folder) is None


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(data: Path, tmp_path: Path, mode: str) -> None:
    """2, then 1, then 3, then 2: the run of one process, with no sample repeated and none left out."""
    run, options = tmp_path / "run", ["--objective.name", "unrolled", "--data.batch_size", 6, "--schedule.name", "constant",
                                      "--optim.ema_decay", 0.9, "--eval.points", 1]  # fmt: skip
    whole = train(data, tmp_path / "whole", *options, "--budget.steps", 8)
    for steps, world in ((2, 2), (4, 1), (6, 3), (8, 2)):
        how = ["--parallel.mode", mode] if world > 1 else []
        train(data, run, *options, *how, "--budget.steps", steps, "--resume", world=world)
    assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in rows(whole)], rel=1e-4)
    assert [row["tokens"] for row in rows(run)] == [row["tokens"] for row in rows(whole)]
    for name, tensor in everything(run).items():
        torch.testing.assert_close(tensor, everything(whole)[name], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_carried_states_go_on_with_any_number_of_processes(data: Path, tmp_path: Path, mode: str) -> None:
    """Uninterrupted by two processes; cut and continued by two, to the bit; by one and three, up to rounding."""
    options = [*KINDS["carried"], "--data.batch_size", 6, "--run.checkpoint_every", 7, "--eval.points", 1,
               "--budget.steps", 10]  # fmt: skip
    many_of = [*options, "--parallel.mode", mode]
    whole = train(data, tmp_path / "whole", *many_of, world=2)
    last = find_checkpoint(whole)
    for world in (2, 1, 3):
        run = Path(shutil.copytree(whole, tmp_path / f"cut-{world}"))
        shutil.rmtree(find_checkpoint(run))
        train(data, run, *(many_of if world > 1 else options), "--resume", world=world)
        ours, theirs = (Checkpoint(find_checkpoint(path)).slot_tensors(range(6)) for path in (run, whole))
        assert sorted(ours) == sorted(f"{kind}.{slot}" for kind in ("held", "state") for slot in range(6))
        assert {name: held.tolist() for name, held in ours.items() if name < "s"} == {
            name: held.tolist() for name, held in theirs.items() if name < "s"
        }
        if world == 2:
            assert_equal(everything(run) | ours, everything(whole) | theirs)
            assert rows(run)[-1]["loss"] == rows(whole)[-1]["loss"]
        assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in rows(whole)], rel=1e-4)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=2e-3, atol=2e-4)
    assert set(Checkpoint(last).slot_tensors(range(2, 4))) == {"held.2", "held.3", "state.2", "state.3"}


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        ({"mode": "none"}, 2, "parallel.mode = none runs one process, but there are 2"),
        ({"mode": "ddp", "shard_size": 2}, 2, "parallel.shard_size needs parallel.mode = fsdp, not ddp"),
        ({"mode": "fsdp", "shard_size": 3}, 4, "parallel.shard_size = 3 does not divide 4 processes"),
        ({"mode": "fsdp"}, 2, "started by torchrun"),
    ],
)
def test_settings_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], world: int, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=message):
        Team.join(ParallelConfig(**settings), torch.device("cpu"))
    assert not dist.is_initialized()


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"data.batch_size = 16 is not a multiple of 3 processes"):
        Team("ddp", torch.device("cpu"), rank=0, world=3).sequences_per_process(16)


def test_mistakes_are_one_line_of_one_process(data: Path, tmp_path: Path) -> None:
    """What only the first process looks at reaches the others too."""
    run = tmp_path / "run"
    train(data, run, "--budget.steps", 1)
    for more, message in (
        ([], "continue it with --resume or replace it with --overwrite"),
        (
            ["--parallel.mode", "fsdp", "--optim.name", "muon", "--overwrite"],
            "optim.name = muon does not run on sharded matrices",
        ),
    ):
        job = many.Job(tmp_path / "logs", 2, many.train, words(data, run, "--budget.steps", 2, *more))
        job.processes[0].join(30)
        assert job.processes[0].exitcode == 2
        assert message in job.text(0)
        [line] = [line for line in job.text(0).splitlines() if line]
        assert line.startswith("error: ")
        job.logs[0].unlink()
        job.wait(timeout=0)
    assert rows(run)[-1]["step"] == 1


def test_only_what_a_job_began_is_continued_by_its_restart(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun restarts processes that refused an older run's directory as well: they must refuse it again."""
    run = tmp_path / "run"
    config = load_config(None, words(data, run, "--budget.steps", 2))
    train(data, run, "--budget.steps", 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for name in ("none", "job-7"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert after_restart(config, "", True) == ("", True)
    train(data, run, "--budget.steps", 1, "--overwrite")
    assert after_restart(config, "", True) == ("last-good", False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-8")
    assert after_restart(config, "", True) == ("", True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert after_restart(config, "newest", False) == ("newest", False)
    shutil.rmtree(run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert after_restart(config, "", False) == ("", False)
