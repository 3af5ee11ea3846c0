"""Speculation by depth and along the diagonal: the tokens of sequential decoding, or their distribution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import micro_config, micro_model
from torch import Tensor, nn

from recurrent_db import UserError, generate
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.generation.decoder import DecodingStats, EndsText, never
from recurrent_db.generation.generate import stream
from recurrent_db.generation.options import GenerationOptions, Sampler
from recurrent_db.generation.speculation import DiagonalDecoder
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.attention import SDPA, Rule, Visible
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng

WINDOW = 32  # of the models here
KINDS = [["next_token"], ["unrolled"], ["unrolled", "--model.injection", "diagonal", "--model.n_coda", "2"]]
EXACT = ["speculative", "speculative:1:2", "speculative:2:9", "speculative:5:4", "speculative:9:1",
         "diagonal", "diagonal:1", "diagonal:3", "diagonal:5", "diagonal:9"]  # fmt: skip


def built(options: Sequence[str], spread: float = 0.1) -> LoopedLM:
    return micro_model(micro_config("--objective.name", *options, "--model.n_core", "2"), spread=spread)[0]


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = prompts_of(5, 1, WINDOW - 3, WINDOW, WINDOW + 9, 14, 2, 1)


def texts(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    sampler: str,
    requests: Sequence[int] | None = None,
    ends_text: EndsText = never,
    stats: DecodingStats | None = None,
    **changes: Any,
) -> list[list[int]]:
    drawn: list[list[int]] = [[] for _ in prompts]
    options = GenerationOptions(k=5, max_new_tokens=24, seed=1, sampler=sampler).changed(**changes)
    for index, token in stream(model, prompts, options, requests, ends_text, stats):
        drawn[index].append(token)
    return drawn


def at_different_times(sequence: int, token: int) -> bool:
    return token % 16 == 3 or (sequence == 5 and token > 40)


@pytest.mark.parametrize(
    ("options", "sampler"),
    [(KINDS[1], sampler) for sampler in EXACT] + [(kind, name) for kind in KINDS[::2] for name in EXACT[2:7:4]],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[::2]),
)
def test_the_tokens_of_sequential_decoding(options: list[str], sampler: str) -> None:
    """Greedy, with and without a repetition penalty; along the diagonal at any temperature. Rows of all lengths, some of
    which grow out of the window; at once or ending at different times. float64."""
    model = built(options)
    settings = [{"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.5}]
    if sampler.startswith("diagonal"):
        settings += [{"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}]
    for changes in settings:
        assert texts(model, PROMPTS, sampler, **changes) == texts(model, PROMPTS, "sequential", **changes)
        ended = texts(model, PROMPTS, sampler, ends_text=at_different_times, **changes)
        assert ended == texts(model, PROMPTS, "sequential", ends_text=at_different_times, **changes)
    assert len({len(text) for text in ended}) > 3


@pytest.mark.parametrize("sampler", ["speculative:1:4", "speculative:2:7", "diagonal:2", "diagonal-unverified:2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_together_draw_what_each_draws_alone(sampler: str, temperature: float) -> None:
    model = built(["unrolled"])
    together = texts(model, PROMPTS, sampler, range(100, 108), at_different_times, temperature=temperature)
    for number, prompt in enumerate(PROMPTS):
        ends_text = lambda _, token, number=number: at_different_times(number, token)  # noqa: E731
        alone = texts(model, [prompt], sampler, [100 + number], ends_text, temperature=temperature)
        assert alone == [together[number]], number


PROMPT, ROWS, TEMPERATURE = [1, 2, 3], 1500, 1.5


@torch.no_grad()
def log_p(model: LoopedLM, k: int, *tokens: int) -> Tensor:
    """Log-probabilities after PROMPT and each of ``tokens``, of all requests, without a cache: (ROWS, 1 + tokens, 5)."""
    ids = torch.tensor([*PROMPT, *tokens]).expand(ROWS, -1)
    noise = NoiseSource(Rng(1, EVALUATION_STEP), torch.arange(ROWS), WINDOW)
    [(_, hidden)] = model.recurrence.hidden(model, ids, model.encode(ids), [k], noise)
    return (model.logits(hidden[:, len(PROMPT) - 1 :]).double() / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("objective", ["next_token", "unrolled"])
def test_speculative_sampling_keeps_the_distribution(objective: str) -> None:
    """Three tokens at a time: their joint counts follow K's distribution (chi-squared), those of drafts alone do not."""
    from scipy.stats import chi2

    model = micro_model(micro_config("--objective.name", objective), vocab_size=5, spread=0.25)[0].float()
    expected_125 = torch.cat([
        (p[:, 0, first] + p[:, 1, second])[:, None].add(p[:, 2]).exp().sum(0)
        for first, second in itertools.product(range(5), repeat=2)
        for p in [log_p(model, 4, first, second)]
    ])  # fmt: skip
    assert expected_125.sum().item() == pytest.approx(ROWS, rel=1e-4)
    common = expected_125 > 5
    assert common.sum() > 40

    def pooled(counts_125: Tensor) -> Tensor:
        rare = counts_125[~common]
        return torch.cat((counts_125[common], rare.sum(0, keepdim=True))) if len(rare) else counts_125

    def statistic(sampler: str, k: int) -> float:
        drawn = torch.tensor(texts(model, [PROMPT] * ROWS, sampler, max_new_tokens=3, temperature=TEMPERATURE, k=k))
        counts = pooled(torch.bincount(drawn @ torch.tensor([25, 5, 1]), minlength=125).double())
        return ((counts - expected) ** 2 / expected).sum().item()

    expected = pooled(expected_125)
    limit = chi2.ppf(1 - 1e-4, df=len(expected) - 1)
    assert statistic("speculative:1:3", 4) < limit
    assert statistic("speculative:2:2", 4) < limit
    assert statistic("sequential", 4) < limit
    assert statistic("speculative:1:3", 1) > limit


def test_a_draft_is_accepted_as_often_as_the_distributions_overlap() -> None:
    model = micro_model(micro_config("--objective.name", "unrolled"), vocab_size=5, spread=0.25)[0].float()
    stats = DecodingStats()
    texts(model, [PROMPT] * ROWS, "speculative:1:2", stats=stats, max_new_tokens=2, temperature=TEMPERATURE, k=4)
    draft_k4 = (log_p(model, k)[:, 0].exp() for k in (1, 4))
    overlap = torch.minimum(*draft_k4).sum(-1).mean().item()
    assert 0.3 < overlap < 0.95
    # Rows whose draft fell need a second turn, whose block has one position.
    assert (stats.drafted, stats.tokens, stats.steps) == (ROWS, 2 * ROWS, 2)
    assert abs(stats.acceptance - overlap) < 4 * (overlap * (1 - overlap) / ROWS) ** 0.5


def test_a_draft_at_all_iterations_is_always_right() -> None:
    """The draft's read-outs then are the verification's: nothing is rejected, and every block is full."""
    for temperature in (0.0, 1.0):
        stats = DecodingStats()
        texts(built(["unrolled"]), PROMPTS[:2], "speculative:5:6", stats=stats, temperature=temperature)
        assert stats.acceptance == 1
        assert (stats.tokens, stats.steps, stats.tokens_per_step, stats.mean_k) == (48, 4, 12, 5)


def test_what_is_counted() -> None:
    model, stats = built(["unrolled"]), DecodingStats()
    ends_text = lambda _, token: token == 3  # noqa: E731
    [text] = texts(model, PROMPTS[:1], "diagonal:2", stats=stats, ends_text=ends_text, temperature=0)
    assert stats.tokens == len(text) + (len(text) < 24)
    assert stats.steps >= stats.positions == stats.tokens
    assert 0 < stats.accepted < stats.drafted
    assert stats.iterations == 5 * stats.positions


@pytest.mark.parametrize(("inner", "planes"), [(1, 5), (2, 6), (5, 5), (9, 9)])
def test_bytes_of_the_cache(inner: int, planes: int) -> None:
    """A `full` cache's, with one more slot a row, and iterations rounded up to whole stages."""
    model = built(["unrolled"])
    decoder = DiagonalDecoder(
        model, [[1, 2], [3]], GenerationOptions(k=5, max_new_tokens=8, temperature=0), inner=inner
    )
    decoder.step()
    assert decoder.cache is not None and decoder.cache.capacity == 9
    layers = model.config.n_prelude + model.config.n_core * planes + model.config.n_coda
    assert decoder.cache_bytes == 2 * 10 * layers * 2 * model.config.d_model * 8


class Kept:
    """`model.attention.Past` of one position: every slot that any position ever left, by layer and iteration."""

    again = 0

    def __init__(
        self, model: LoopedLM, made: dict[tuple[nn.Module, int, int], tuple[Tensor, Tensor]], place: int
    ) -> None:
        self.made, self.place, self.start = made, place, 0
        cos, sin = model.rope(place + 1)
        self.rope = cos[place:], sin[place:]
        self.visits: dict[nn.Module, int] = {}

    def visible(self, start: int = 0) -> Visible:
        """Who sees whom from iteration ``start`` on."""
        self.start, self.visits = start, {}
        return Visible(Rule(1, self.place + 1), torch.device("cpu"), torch.float64, SDPA, SDPA, None, past=self)

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        visit = self.start + self.visits.get(layer, 0)
        self.visits[layer] = self.visits.get(layer, 0) + 1
        self.made[layer, visit, self.place] = k_BHTE, v_BHTE
        seen = [self.made[layer, visit, place] for place in range(self.place + 1)]
        return torch.cat([k for k, _ in seen], dim=2), torch.cat([v for _, v in seen], dim=2)

    def once_more(self, visible: Visible, e_BTD: Tensor) -> tuple[Visible, Tensor]:
        raise NotImplementedError


@torch.no_grad()
def along_the_diagonal(model: LoopedLM, prompt: list[int], k: int, inner: int, count: int) -> list[int]:
    """Unverified and greedy, position by position, as it is defined."""
    noise = NoiseSource(Rng(1, EVALUATION_STEP), torch.tensor([0]), WINDOW)
    starts = model.recurrence.start(torch.empty(1, WINDOW, 32, dtype=torch.float64), noise)  # type: ignore[attr-defined]
    made: dict[tuple[nn.Module, int, int], tuple[Tensor, Tensor]] = {}
    tokens, done = list(prompt), dict.fromkeys(range(len(prompt)), 0)
    states = {place: starts[:, place : place + 1] for place in range(len(prompt) + count)}

    def run(place: int, iterations: int) -> int:
        past = Kept(model, made, place)
        e = model.encode(torch.tensor([[tokens[place]]]), past.visible())
        states[place] = model.iterate(states[place], e, iterations, visible=past.visible(done[place]))
        done[place] += iterations
        return int(model.logits(model.decode(states[place], visible=past.visible()))[0, -1].argmax())

    for place in range(len(prompt) - 1):
        run(place, k)
    flight, new = [len(prompt) - 1], []
    while len(new) < count:
        said = [(place, run(place, min(inner, k - done[place]))) for place in flight]
        for place, token in said:
            tokens[place + 1 : place + 2] = [token]
        if done[flight[0]] == k:
            new.append(tokens[flight.pop(0) + 1])
        if len(tokens) < len(prompt) + count:
            flight.append(len(tokens) - 1)
            done[flight[-1]] = 0
    return new


@pytest.mark.parametrize("inner", [1, 2, 5])
def test_unverified_against_its_definition(inner: int) -> None:
    model, [prompt] = built(["unrolled"], 0.2), prompts_of(6)
    [ours] = texts(model, [prompt], f"diagonal-unverified:{inner}", max_new_tokens=16, temperature=0)
    assert ours == along_the_diagonal(model, prompt, 5, inner, 16)
    sequential = texts(model, [prompt], "sequential", max_new_tokens=16, temperature=0)[0]
    assert (ours == sequential) == (inner == 5)


def test_the_text_of_every_sampler(tokenizer: Tokenizer) -> None:
    config = micro_config("--objective.name", "unrolled")
    config.model.vocab_size = tokenizer.vocab_size
    model = build_model(config.model, 0).double()
    model.recurrence = build_objective(config).recurrence
    usual = generate(model, tokenizer, "def ", k=4, max_new_tokens=16, temperature=0)
    for sampler in ("speculative", "diagonal:1"):
        stats, options = DecodingStats(), GenerationOptions(k=4, max_new_tokens=16, temperature=0, sampler=sampler)
        assert generate(model, tokenizer, "def ", options, stats=stats) == usual
        assert stats.tokens == 16
        assert generate(model, tokenizer, "def ", options, max_new_tokens=0) == ""


def test_names_of_samplers() -> None:
    assert Sampler.parse("speculative:3") == Sampler("speculative", (3, Sampler.parse("speculative").numbers[1]))
    assert Sampler.parse("diagonal-unverified:4") == Sampler("diagonal-unverified", (4,))
    for word in (
        "",
        "parallel",
        "speculative:0",
        "speculative:1:2:3",
        "diagonal:x",
        "sequential:2",
        "diagonal:",
        "diagonal:" + "9" * 5000,
    ):
        with pytest.raises(UserError, match="the sampler must be sequential"):
            Sampler.parse(word)
    with pytest.raises(UserError, match="need the sequential sampler"):
        GenerationOptions(sampler="diagonal", exit="kl")
    with pytest.raises(UserError, match="need the sequential sampler"):
        GenerationOptions(sampler="speculative", warm_start=True)


def test_what_is_not_supported() -> None:
    for objective, options, message in (
        ("denoise", {"sampler": "speculative"}, "whose inference is a plain loop"),
        ("denoise", {"sampler": "diagonal"}, "whose inference is a plain loop"),
        (
            "unrolled",
            {"sampler": "diagonal", "cache_policy": "last"},
            "cache policy 'last' needs the sequential sampler",
        ),
    ):
        with pytest.raises(UserError, match=message):
            stream(built([objective]), [[1]], GenerationOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one token"):
        stream(built(["unrolled"]), [[1], []], GenerationOptions(sampler="diagonal"))
