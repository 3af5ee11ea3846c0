"""Measure the speed of generation: decoding from the cache against recomputing everything and against bare products.

python benchmarks/speed/decode.py [--config train/configs/pythia-70m-looped.toml] [--k 8] [--tokens 256] [--json OUT]
python benchmarks/speed/decode.py --run RUN --k 32 [--methods speculative,diagonal,kl] [--data DIR] [--json OUT]

With --run, compares the samplers and exits of a checkpoint with sequential decoding (`decode_samplers.py`).

Without --run, an untrained model continues one token greedily. At every 16th token two other things are timed in the same
process:

- recomputing: the logits of that token from its whole context, without a cache;
- products: only the token's products with weights, each a matrix times one vector (`torch.mv`), in the order of decoding, so
  that the processor's caches are used as in decoding. Their rate is the machine's matrix-vector speed. The needed time of a
  token is its FLOPs, including attention over the context, divided by that rate.

On a CPU with one thread, processor time is measured, so that other work on the machine matters less. The last column is the
tokens per second of a batch of several texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from benchmarks.speed.decode_samplers import Candidate, compare, prompts_of, table
from recurrent_db.accounting.flops import inference_cost
from recurrent_db.accounting.hardware import choose_device, environment
from recurrent_db.arguments import Names, run_command
from recurrent_db.config import load_config
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sequential import SequentialDecoder
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.schema import NotNegative, Positive, PositiveInt, at_least
from recurrent_db.store.loading import load_with_config

EVERY = 16
"""Tokens between two comparisons."""
RNG = Rng(0, EVALUATION_STEP)


@dataclass
class Args:
    """Measure decoding from the cache in tokens per second, against recomputing and against bare products."""

    config: Path = Path(__file__).parents[2] / "train/configs/pythia-70m-looped.toml"
    """TOML configuration with the model's shape."""
    objectives: Names = ("unrolled", "denoise")
    """Objectives whose inference is measured."""
    vocab_size: PositiveInt = 2048
    """Vocabulary size if the configuration takes it from a tokenizer."""
    k: PositiveInt = 8
    """Core iterations per token."""
    tokens: Annotated[int, at_least(EVERY)] = 256
    """Tokens to generate after a prompt of one token; at most the model's window."""
    rows: PositiveInt = 16
    """Number of texts in the batch."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, or auto."""
    threads: PositiveInt = 1
    """CPU threads."""
    json: Path | None = None
    """File for the rows."""
    run: Path | None = None
    """Run directory or checkpoint folder whose samplers are compared."""
    data: Path | None = None
    """With --run: folder made by train/prepare_data.py whose held-out text gives the prompts; the run's own by default."""
    methods: Names = ("speculative", "diagonal", "diagonal-unverified", "kl", "entropy", "latent", "kl+warm")
    """With --run: samplers (recurrent_db/generation/samplers.py) and exits (generation/adaptive.py)."""
    prompts: PositiveInt = 8
    """With --run: number of prompts that are continued one by one."""
    prompt_tokens: PositiveInt = 32
    """With --run: length of a prompt, in tokens."""
    temperature: NotNegative = 0.0
    """With --run: sampling temperature; 0 is greedy."""
    repetition_penalty: Positive = 1.0
    """With --run: above 1 prevents greedy text from repeating itself, where every draft would be accepted."""


def clock(device: torch.device) -> Callable[[], float]:
    """Clock in seconds: processor time on a CPU with one thread, else wall time."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def products(model: LoopedLM, k: int) -> tuple[Callable[[], None], int]:
    """A function that computes a token's products with weights, and the number of their FLOPs."""

    def weights(*modules: nn.Module) -> list[Tensor]:
        return [layer.weight for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]

    passes = model.recurrence.passes(k)
    prelude, core = weights(*model.prelude), weights(model.core)
    read = [*weights(*model.coda), model.embedding.weight]
    bridge = [model.embedding.weight.T] if passes.bridges else []
    condition = weights(model.noise_embedding) if model.noise_embedding is not None and passes.noise_levels else []
    if passes.beside:
        raise UserError("products of inference with two streams are not listed here")
    if passes.readouts_no_grad == 1:
        order = [*prelude, *(condition + core) * k, *read]
    else:
        order = [*prelude, *(condition + core + read + bridge) * (k - 1), *condition, *core, *read]
    vectors = {w.shape[1]: torch.randn(w.shape[1], device=w.device) for w in order}

    def run() -> None:
        for weight in order:
            torch.mv(weight, vectors[weight.shape[1]])

    return run, 2 * sum(weight.numel() for weight in order)


def recompute(model: LoopedLM, ids: list[int], k: int) -> Tensor:
    """Logits of the next token without a cache, (V,)."""
    tokens_BT = torch.tensor([ids], device=model.embedding.weight.device)
    noise = NoiseSource(RNG, torch.tensor([0]), model.config.max_seq_len)
    [(_, hidden_BTD)] = model.recurrence.hidden(model, tokens_BT, model.encode(tokens_BT), [k], noise)
    return model.logits(hidden_BTD[0, -1])


@torch.no_grad()
def measure(args: Args, objective: str) -> dict[str, Any]:
    config = load_config(args.config, ["--objective.name", objective])
    config.model.vocab_size = config.model.vocab_size or args.vocab_size
    if args.tokens > config.model.max_seq_len:
        raise UserError(f"--tokens {args.tokens} is above the model's window of {config.model.max_seq_len}")
    device = choose_device(args.device)
    model = build_model(config.model, 0, device).eval()
    model.recurrence = build_objective(config).recurrence
    now, options = clock(device), GenerationOptions(k=args.k, max_new_tokens=args.tokens, temperature=0)

    def timed(action: Callable[[], object]) -> float:
        start = now()
        action()
        return now() - start

    def step(decoder: SequentialDecoder) -> None:
        for sequence, tokens in decoder.step():
            decoder.batch.append(sequence, *tokens)

    passes = model.recurrence.passes(args.k)
    bare_products, weight_flops = products(model, args.k)
    decoder = SequentialDecoder(model, [[0]], options)
    decoding, recomputing, bare, needed = [], [], [], []
    for warm in (bare_products, partial(recompute, model, [0] * EVERY, args.k)):
        warm()
    for length in range(1, args.tokens + 1):
        decoding.append(timed(partial(step, decoder)))
        if length % EVERY == 0:
            ids = decoder.batch.ids[0][:length]
            recomputing.append(timed(partial(recompute, model, ids, args.k)))
            bare.append(timed(bare_products))
        # Decoding embeds the noise level again for each token; a whole window embeds it once.
        needed.append(inference_cost(config.model, length, replace(passes, noise_levels=length * passes.noise_levels)))
    assert decoder.cache is not None
    seconds, rate = sum(decoding), weight_flops / statistics.median(bare)
    batch = SequentialDecoder(model, [[0]] * args.rows, replace(options, max_new_tokens=EVERY))
    together = [timed(partial(step, batch)) for _ in range(EVERY)]
    return {
        "objective": objective, "config": args.config.stem, "k": args.k, "tokens": args.tokens, "device": str(device),
        "threads": torch.get_num_threads(), "seconds": seconds, "tokens_per_s": args.tokens / seconds,
        "seconds_recomputing": sum(recomputing) * args.tokens / len(recomputing),
        "speedup": sum(recomputing) * args.tokens / len(recomputing) / seconds,
        "flops": sum(needed), "matrix_vector_flops_per_s": rate, "seconds_needed": sum(needed) / rate,
        "over_needed": seconds * rate / sum(needed),
        "cache_bytes": decoder.cache.bytes, "cache_bytes_per_token": decoder.cache.bytes // decoder.cache.capacity,
        "rows": args.rows, "tokens_per_s_of_rows": args.rows / statistics.median(together[1:]),
    }  # fmt: skip


def samplers(args: Args, run: Path) -> list[dict[str, Any]]:
    """Print and return the rows of `decode_samplers.compare`."""
    options = GenerationOptions(
        k=args.k,
        max_new_tokens=args.tokens,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
    )
    candidates = [Candidate.parse(word, options) for word in args.methods]
    model, tokenizer, config, checkpoint = load_with_config(run, args.device)
    data, count = str(args.data or config.data.path), max(args.prompts, args.rows)
    prompts = prompts_of(data, tokenizer.hash, config.data.sequence_length, count, args.prompt_tokens)
    print(
        f"{checkpoint}: {config.objective.name}, K = {args.k}, {args.tokens} tokens after prompts of"
        f" {len(prompts[0])}, temperature {args.temperature:g}, repetition penalty {args.repetition_penalty:g}"
    )
    now = clock(model.embedding.weight.device)
    rows = compare(model, prompts, args.prompts, args.rows, candidates, options, now)
    print(table(rows))
    return rows


def main(args: Args) -> None:
    if args.json is not None:
        check_output(args.json)
    torch.set_num_threads(args.threads)
    rows = samplers(args, args.run) if args.run is not None else fresh_models(args)
    if args.json is not None:
        write_atomic(
            args.json, json.dumps({"rows": rows, "environment": environment(choose_device(args.device))}, indent=1)
        )


def fresh_models(args: Args) -> list[dict[str, Any]]:
    """Print and return the rows of `measure`."""
    print(
        f"{'':<12}{'tokens/s':>10}{'ms/token':>10}{'recomputing':>13}{'x faster':>10}{'needed':>9}{'x needed':>10}"
        f"{'GFLOP/s':>9}{'cache MiB':>11}{f'{args.rows} rows, tokens/s':>20}"
    )
    rows = []
    for objective in args.objectives:
        row = measure(args, objective)
        rows.append(row)
        each = 1e3 / args.tokens
        print(
            f"{objective:<12}{row['tokens_per_s']:>10.1f}{each * row['seconds']:>10.1f}"
            f"{each * row['seconds_recomputing']:>13.1f}{row['speedup']:>10.1f}{each * row['seconds_needed']:>9.1f}"
            f"{row['over_needed']:>10.2f}{row['matrix_vector_flops_per_s'] / 1e9:>9.2f}"
            f"{row['cache_bytes'] / 2**20:>11.1f}{row['tokens_per_s_of_rows']:>20.1f}",
            flush=True,
        )
    print(
        "ms/token, recomputing, needed: milliseconds per token, averaged over the text. needed: the token's FLOPs at the"
        "\nrate of its bare products with weights, each a matrix times one vector (GFLOP/s).",
        file=sys.stderr,
    )
    return rows


if __name__ == "__main__":
    run_command(Args, main)
