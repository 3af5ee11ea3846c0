"""Measure the quality of text that a run generates, by K and decoding, beside real text and baselines.

python eval/generation.py RUN --judge JUDGE --data DIR [--k 1,8] [--decodings t=1,p=0.95,greedy] [--json OUT]

The model continues held-out prompts. A judge reads the continuations: a flat model that was trained on other documents
(eval/train_judge.py). The printed table has one row for each kind of text, with these columns:

  MAUVE     similarity to real continuations of the same prompts; 1 is best. Needs the extra `mauve`. Its features are the
            judge's hidden state at the last token, as in the paper. MAUVE-mean uses the mean hidden state over the
            continuation, which separates models better. The row `real` compares real text with other real text.
  gen-PPL   perplexity under the judge, per judge token. bits/byte is the same score, independent of the tokenizer.
  dist-n    distinct n-grams divided by all n-grams, in judge tokens, over one continuation of every prompt
  rep-4     share of a continuation's 4-grams that occurred earlier in it (seq-rep-4, arXiv:1908.04319)
  rank      rank by gen-PPL among the rows whose dist-2 is within 0.03 of real text's. Other rows have none, because
            repetition lowers perplexity.

The intervals are 95 percent intervals over prompts. The numbers are comparable only for the same judge, prompts and lengths.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from recurrent_db.accounting.flops import inference_cost
from recurrent_db.arguments import Names, run_command
from recurrent_db.config import Config
from recurrent_db.data import document, load_tokenizer, open_data
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.evaluation.continuations import (
    Prompt,
    choose_prompts,
    continue_prompts,
    frequencies,
    independent_texts,
    parse_decoding,
    with_walk,
)
from recurrent_db.evaluation.judge import COMPARED_DOCUMENTS, Judge, Reading, check_apart, mark
from recurrent_db.evaluation.text_metrics import (
    COLUMNS,
    DISTINCT_MARGIN,
    Measures,
    cells,
    half_samples,
    has_mauve,
    heading,
    measure,
    rank,
)
from recurrent_db.files import check_output, write_atomic
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.schema import Count, PositiveInt, at_least
from recurrent_db.store.loading import load_with_config

FEATURES = {
    "mauve": "the judge's hidden state (after the final norm) of the last token of prompt and continuation",
    "mauve_mean": "the mean of the judge's hidden states over the continuation",
}

WalkChoices = dict[str, str]
"""The bridge and sampler of a denoiser's walk."""
Row = dict[str, Any]


@dataclass
class Args:
    """Measure the text that a run generates with its newest good checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    judge: Path
    """Run directory of the judge. eval/train_judge.py trains it on other documents."""
    data: Path
    """Folder made by train/prepare_data.py. Prompts and real continuations come from its validation split, the unigram
    baseline's frequencies from its training split."""
    k: tuple[PositiveInt, ...] = (1, 8)
    """Values of K (core iterations)."""
    decodings: Names = ("t=1", "p=0.95", "greedy")
    """Decodings: greedy, t=TEMPERATURE, p=TOP_P or t=TEMPERATURE:p=TOP_P."""
    bridge: tuple[Literal["soft", "hard", "sample", "state"], ...] = ()
    """Bridges to try for a denoiser's walk. The default is the run's own.
    K = 1 uses no bridge."""
    sampler: tuple[Literal["euler", "heun", "ancestral"], ...] = ()
    """Samplers to try for a denoiser's walk. The default is the run's own."""
    prompts: Annotated[int, at_least(4)] = 200
    """Number of held-out prompts. Twice as many windows of held-out text are needed, to compare real text with real text."""
    prompt_tokens: PositiveInt = 32
    """Length of a prompt, in tokens."""
    tokens: PositiveInt = 50
    """Longest continuation, in tokens; the end of a document ends it earlier. A run with another tokenizer than the data's
    generates as many of its own tokens as the real continuations have on average."""
    each: PositiveInt = 5
    """Continuations of each prompt. Greedy decoding makes one if the model starts from no noise."""
    resamples: Count = 200
    """Half samples of the prompts, from which the intervals are computed; 0 computes none."""
    batch_size: PositiveInt = 32
    """Texts in a batch."""
    seed: int = 0
    """Seed of the choice of prompts, of the tokens and of the noise."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    allow_shared: bool = False
    """Warn, and do not stop, if the judge was trained on documents of the run or of the prompts."""
    json: Path | None = None
    """File for the result."""


# ---------------------------------------------------------------------------------------------------------------------
# Settings to try, and the check of the judge


def settings(args: Args, model: LoopedLM, ks: list[int]) -> list[tuple[int, WalkChoices]]:
    """The settings to try, as pairs (K, choices of the walk). A walk with K = 1 has no step, so it has no choices."""
    bridges, samplers = dict.fromkeys(args.bridge), dict.fromkeys(args.sampler)
    walk = model.recurrence.walk
    if walk is None:
        if bridges or samplers:
            raise UserError(f"{args.run} is not a denoiser, so --bridge and --sampler do not apply")
        return [(k, {}) for k in ks]
    each = [
        {"bridge": bridge, "sampler": sampler}
        for bridge in bridges or [walk.config.bridge]
        for sampler in samplers or [walk.config.sampler]
    ]
    return [(k, choices) for k in ks for choices in (each if k > 1 else [{}])]


def check_judge(judge: Judge, config: Config, prompt_marks: set[str], allow: bool) -> dict[str, float | None]:
    """Check that the judge was not trained on the documents that it must judge.

    Returns:
        The shares of the run's training documents and of the prompts' documents that the judge was trained on. The first
        is None if the run's training data no longer exist.

    Raises:
        UserError: the judge was trained on some of them and ``allow`` is false. With ``allow`` it is a warning.
    """

    def trouble(message: str) -> None:
        if not allow:
            raise UserError(f"{message} (--allow-shared continues with a warning)")
        print(f"warning: {message}", file=sys.stderr)

    shared: dict[str, float | None] = {"run": None, "prompts": len(judge.saw(prompt_marks)) / len(prompt_marks)}
    if shared["prompts"]:
        trouble(f"the judge was trained on {shared['prompts']:.1%} of the documents that the prompts come from")
    trained_on = Path(config.data.path)
    try:
        open_data(trained_on, "train")
    except UserError as error:
        print(f"warning: cannot check whether the judge knows the run's training documents: {error}", file=sys.stderr)
        return shared
    try:
        shared["run"] = check_apart(judge.kept, trained_on, "train", COMPARED_DOCUMENTS)
    except UserError as error:
        shared["run"] = 1.0
        trouble(str(error))
        return shared
    if shared["run"]:
        trouble(f"the judge was trained on {shared['run']:.1%} of the documents that the run was trained on")
    return shared


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Bench:
    """The prompts, their real continuations and the judge. Turns sets of texts into rows of the table."""

    def __init__(self, args: Args, judge: Judge, config: Config, tokenizer: Tokenizer) -> None:
        self.args, self.judge, self.tokenizer = args, judge, tokenizer
        self.data_tokenizer = load_tokenizer(args.data)
        held_out = open_data(args.data, "validation", verify=True)
        chosen = choose_prompts(held_out, 2 * args.prompts, args.prompt_tokens, args.tokens, args.seed)
        names = {(prompt.source, prompt.number) for prompt in chosen}
        marks = {mark(document(held_out.sources[source], number), self.data_tokenizer) for source, number in names}
        self.shared = check_judge(judge, config, marks, args.allow_shared)

        prompts, others = chosen[: args.prompts], chosen[args.prompts :]
        self.prompts, self.real = self.texts(prompts)
        context = judge.model.config.max_seq_len
        lengths = [len(ids) for ids in judge.tokenizer.encode_batch([*self.prompts, *self.real])]
        if sum(lengths) > context * args.prompts:  # only the mean must fit; a single long text is cut
            raise UserError(
                f"prompt and continuation take {sum(lengths) / args.prompts:.0f} judge tokens, but the judge's context has"
                f" {context}: lower --prompt-tokens or --tokens, or train a judge with a longer model.max_seq_len"
            )
        self.prompt_ids, self.tokens = [prompt.ids for prompt in prompts], args.tokens
        if tokenizer.hash != self.data_tokenizer.hash:
            self.prompt_ids = [ids or [tokenizer.eos_id] for ids in tokenizer.encode_batch(self.prompts)]
            self.tokens = max(1, round(float(np.mean([len(ids) for ids in tokenizer.encode_batch(self.real)]))))

        self.halves = half_samples(args.prompts, args.resamples, args.seed)
        self.mauve = has_mauve()
        if not self.mauve:
            print("note: MAUVE is left out: install it with pip install 'recurrent-db[mauve]'", file=sys.stderr)
        self.reading = self.read(self.prompts, self.real)
        self.other_reading = self.read(*self.texts(others))

    def texts(self, prompts: list[Prompt]) -> tuple[list[str], list[str]]:
        """Decode the prompts and their real continuations."""
        decode = self.data_tokenizer.decode
        return [decode(prompt.ids) for prompt in prompts], [decode(prompt.real_ids) for prompt in prompts]

    def read(self, prompts: list[str], texts: list[str]) -> Reading:
        return self.judge.read(prompts, texts, self.args.batch_size)

    def real_row(self) -> Row:
        """The row of real text. Its MAUVE compares it with other real text, not with itself."""
        found = measure([self.reading], self.other_reading if self.mauve else None, self.halves)
        return self._row("real", [self.real], [self.reading], found, {})

    def row(self, name: str, sets: list[list[str]], described: Row | None = None) -> Row:
        """The row of generated text. Each set has one continuation of every prompt."""
        readings = [self.read(self.prompts, texts) for texts in sets]
        found = measure(readings, self.reading if self.mauve else None, self.halves)
        return self._row(name, sets, readings, found, described or {})

    def _row(self, name: str, sets: list[list[str]], readings: list[Reading], found: Measures, described: Row) -> Row:
        return {
            "name": name,
            **{key: described.get(key) for key in ("k", "decoding", "bridge", "sampler", "flops_per_token")},
            "texts": sum(map(len, sets)),
            "bytes_per_text": float(np.mean([reading.bytes for reading in readings])),
            "judge_tokens_per_text": float(np.mean([reading.tokens for reading in readings])),
            **{key: found.values.get(key) for key in COLUMNS},
            "intervals": {key: list(found.intervals[key]) for key in COLUMNS if key in found.intervals},
            "sample": sets[0][0],
        }

    def generated_rows(
        self,
        model: LoopedLM,
        untrained: LoopedLM,
        tries: list[tuple[int, WalkChoices]],
        decodings: list[str],
    ) -> list[Row]:
        """One row for each K, walk and decoding, and one row of the untrained model."""
        args, rows, own = self.args, [], model.recurrence
        jobs = [(model, "model", k, walk, name) for k, walk in tries for name in decodings]
        jobs.append((untrained, "untrained", tries[0][0], {}, "t=1"))
        total = len(jobs) * args.prompts * args.each
        with tqdm(total=total, desc="generating", unit="text", disable=None, leave=False) as bar:
            for number, (source, name, k, walk, decoding) in enumerate(jobs, 1):
                source.recurrence = with_walk(own, walk)
                options = replace(parse_decoding(decoding), k=k, max_new_tokens=self.tokens, seed=args.seed)
                sets = continue_prompts(
                    source, self.tokenizer, self.prompt_ids, options, args.each, args.batch_size, bar.update
                )
                passes = source.recurrence.passes(k)
                cost = inference_cost(source.config, args.prompt_tokens + self.tokens, passes)
                described = {"k": k, "decoding": decoding, **walk, "flops_per_token": cost}
                rows.append(self.row(name, [[self.tokenizer.decode(ids) for ids in one] for one in sets], described))
                bar.n = number * args.prompts * args.each  # greedy decoding may generate fewer texts
        return rows

    def baseline_rows(self) -> list[Row]:
        """Rows of independent tokens: drawn with the training split's frequencies, and drawn uniformly."""
        args, eos_id = self.args, self.data_tokenizer.eos_id
        shares = {"unigram": frequencies(open_data(args.data, "train"))}
        shares["uniform"] = np.full_like(shares["unigram"], 1 / len(shares["unigram"]))
        rows = []
        for name, shares_V in shares.items():
            drawn = independent_texts(shares_V, eos_id, args.prompts * args.each, args.tokens, args.seed)
            texts = [self.data_tokenizer.decode(ids) for ids in drawn]
            rows.append(self.row(name, [texts[draw :: args.each] for draw in range(args.each)]))
        return rows


def table(rows: list[Row]) -> str:
    """The rows as a printed table."""
    lines = [f"{'row':<10}{'K':>4} {'decoding':<13}{'walk':<16}{'bytes':>6}{heading()}{'rank':>6}"]
    for row in rows:
        walk = " ".join(filter(None, (row["bridge"], row["sampler"])))
        line = (
            f"{row['name']:<10}{row['k'] or '':>4} {row['decoding'] or '':<13}{walk:<16}{row['bytes_per_text']:>6.0f}"
        )
        lines.append(f"{line}{cells(row)}{row['rank'] or '-':>6}")
    return "\n".join(lines)


def main(args: Args) -> int:
    ks = sorted(set(args.k))
    decodings = list(dict.fromkeys(args.decodings))
    for word in decodings:
        parse_decoding(word)
    if args.json is not None:
        check_output(args.json)
    model, tokenizer, config, checkpoint = load_with_config(args.run, args.device)
    tries = settings(args, model, ks)
    judge = Judge.load(args.judge, args.device)
    bench = Bench(args, judge, config, tokenizer)
    untrained = build_model(config.model, config.seed, model.embedding.weight.device).eval()

    rows = [bench.real_row(), *bench.generated_rows(model, untrained, tries, decodings), *bench.baseline_rows()]
    rank(rows[0], rows[1:])
    result = {
        "checkpoint": str(checkpoint), "objective": config.objective.name, "judge": str(judge.checkpoint),
        "judge_data": judge.kept.get("data"), "judge_tokenizer": judge.tokenizer.hash, "shared_documents": bench.shared,
        "data": str(args.data), "features": FEATURES, "prompts": args.prompts, "prompt_tokens": args.prompt_tokens,
        "tokens": bench.tokens, "each": args.each, "seed": args.seed, "resamples": args.resamples,
        "distinct_2_margin": DISTINCT_MARGIN, "rows": rows,
    }  # fmt: skip
    print(f"{checkpoint}: {config.objective.name}; judge {judge.checkpoint}")
    print(
        f"{args.prompts} prompts of {args.prompt_tokens} tokens, {args.each} continuations of {bench.tokens} tokens each"
    )
    print(table(rows))
    if args.json is not None:
        write_atomic(args.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
