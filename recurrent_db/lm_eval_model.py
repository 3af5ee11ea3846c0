"""A checkpoint as a model of the lm-eval harness, under the name ``recurrent_db``.

    python eval/lm_eval_cli.py --model recurrent_db --model_args checkpoint=RUN,k=8 --tasks ...

Importing this module registers the name; it needs the extra ``eval``. Scores come from `likelihood.score_positions` and
text from `generate.complete`, so the harness sees the model that every other command sees.

- A ``denoise`` checkpoint at k = 1 is its read-out at sigma_max; at k > 1 it is the k-step walk's mixture over
  ``draws`` noise draws. Scoring starts from noise (or zeros), never from the answer.
- Batching, order and padding change nothing: sequences are padded on the right of a causal model, and noise is a
  function of the request. For a (context, continuation) pair it is keyed by the context, so that the choices of one
  question are compared under the same noise; for a rolling window by the window; for a text by its prompt.
- A request longer than the window keeps its right end, as in the harness's own models.
- Where the tokens of the context are not the first tokens of context + continuation (a token straddles the border), the
  pair is cut after the longest common prefix: the continuation's score then includes the straddling token whole, and no
  byte of the continuation is lost.

One process only.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from recurrent_db.errors import UserError
from recurrent_db.generate import complete
from recurrent_db.likelihood import score_positions
from recurrent_db.loading import load_with_config
from recurrent_db.rng import EVALUATION_STEP, Rng, key
from recurrent_db.sampling import Sampling

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f'the lm-eval harness is not installed ({error}): pip install "recurrent-db[eval]"') from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

eval_logger = logging.getLogger("lm_eval.recurrent_db")

# Automatic batches: tokens (a CPU is fastest while they stay in its caches), and vocabulary-wide values (one fp32 copy
# of 256 MiB on a CPU, 1 GiB on a GPU) at once.
_AUTO_TOKENS = {"cpu": 1 << 10, "cuda": 1 << 15}
_AUTO_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 28}
_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Window:
    """What one forward pass scores: the tokens after the last ``len(targets)`` of ``inputs``."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    request: int
    """Key of the noise."""


def _whole_number(name: str, value: Any, least: int) -> int:
    """A model argument as int; the harness hands over numbers or the strings they were typed as."""
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if number < least:
        raise UserError(f"model argument {name} must be a whole number of {least} or more, got {value!r}")
    return number


@register_model("recurrent_db")
class RecurrentDBLM(TemplateLM):
    """The harness's model arguments (``--model_args checkpoint=RUN,k=8,...``) are the constructor's.

    Args:
        checkpoint: run directory or checkpoint folder.
        k: core iterations, 1 or more.
        draws: noise draws in the mixture of a likelihood; inference without noise ignores it.
        batch_size: sequences at once, or "auto": as many as hold 1,024 tokens (a GPU: 32,768) and 2^26 logits (2^28).
        max_batch_size: the most sequences at once.
        max_length: window in tokens, at most (and by default) the model's.
        dtype: "float32", or "bfloat16" for autocast as in training.
        device: cpu, cuda, cuda:N or auto.
        seed: of the noise and of sampling.

    Raises:
        UserError: an argument that is unknown or out of range, or no checkpoint there.
    """

    def __init__(
        self,
        checkpoint: str = "",
        k: int | str = 8,
        draws: int | str = 1,
        batch_size: int | str | None = "auto",
        max_batch_size: int | str | None = None,
        max_length: int | str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        seed: int | str = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("trust_remote_code", None)  # the harness adds it to every model's arguments; it is the tasks'
        if unknown:
            name = next(iter(unknown))
            known = [p for p in inspect.signature(RecurrentDBLM).parameters if p != "unknown"]
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"unknown model argument {name!r}; "
                + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
            )
        if not checkpoint:
            raise UserError("the model needs a run: --model_args checkpoint=RUN,k=8")
        self.k = _whole_number("k", k, 1)
        self.draws = _whole_number("draws", draws, 1)
        self.seed = _whole_number("seed", seed, 0)
        automatic = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = None if automatic else _whole_number("batch_size", batch_size, 1)
        self.max_batch_size = None if max_batch_size is None else _whole_number("max_batch_size", max_batch_size, 1)
        if dtype not in _DTYPES:
            raise UserError(f"model argument dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        self.dtype = dtype
        self.model, self.tokenizer, config, self.checkpoint = load_with_config(str(checkpoint), str(device))
        self._device = self.model.embedding.weight.device
        window = self.model.config.max_seq_len
        self.max_length = window if max_length is None else _whole_number("max_length", max_length, 1)
        if self.max_length > window:
            raise UserError(f"model argument max_length = {max_length} is above the model's window of {window} tokens")
        self.objective = config.objective.name
        self.rng = Rng(self.seed, EVALUATION_STEP)
        if self.objective == "next_token" and self.k > 1:
            eval_logger.warning("%s was trained at K = 1 (next_token) and is evaluated at K = %d", checkpoint, self.k)

    # -- what the harness asks about the model -----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The document separator: what precedes a text in training, hence the context of an empty context."""
        return self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"sentencepiece-{self.tokenizer.hash}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise UserError("a recurrent_db checkpoint has no chat template: leave --apply_chat_template out")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to ``config`` in its results."""
        return {
            "checkpoint": str(self.checkpoint),
            "objective": self.objective,
            "k": self.k,
            "draws": self.draws if self.model.recurrence.stochastic else 1,
            "noise_seed": self.seed,
            "max_length": self.max_length,
            "model_dtype": self.dtype,
            "model_num_parameters": self.model.parameter_counts()["total"],
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; there are no special tokens to add."""
        return self.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, together the tokens of their text; the context is never empty.

        White space at the context's end belongs to the continuation, as in `TemplateLM`.
        """
        border = len(context.rstrip())
        context, continuation = context[:border], context[border:] + continuation
        whole, head = self.tok_encode(context + continuation), self.tok_encode(context)
        common = next(
            (i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole))
        )
        return whole[:common] or [self.prefix_token_id], whole[common:]

    # -- likelihood --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether every token of it is the most likely one) of each request."""
        encoded = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for _, context, continuation in requests:
            kept = (context + continuation)[-(self.max_length + 1) :]
            targets = kept[1:][-len(continuation) :] if continuation else []
            windows.append(Window(tuple(kept[:-1]), tuple(targets), key("loglikelihood", *context)))
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        lost = sum(len(continuation) > self.max_length for _, _, continuation in requests)
        if cut:
            eval_logger.warning(
                "%d of %d requests are longer than the window of %d tokens and lose their left end; %d of them lose part "
                "of the continuation, whose score then covers fewer tokens",
                cut, len(requests), self.max_length, lost,
            )  # fmt: skip
        scored = self._score(windows, disable_tqdm)
        results = [scored[window] for window in windows]
        for (pair, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text in nats, in windows of ``max_length`` tokens, each token predicted once."""
        windows_by_text = []
        for request in requests:
            (text,) = request.args
            windows = []
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(pair)
                ids = (*context, *continuation)
                windows.append(Window(ids[:-1], tuple(continuation), key("rolling", *ids)))
            windows_by_text.append(windows)
        scored = self._score([window for windows in windows_by_text for window in windows], disable_tqdm)
        results = [sum(scored[window][0] for window in windows) for windows in windows_by_text]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return [float(result) for result in results]

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Windows of like length together, the longest first, so that too large a batch fails at once."""
        ordered = sorted(windows, key=lambda window: -len(window.inputs))
        kind = "cuda" if self._device.type == "cuda" else "cpu"
        tokens = min(_AUTO_TOKENS[kind], _AUTO_LOGITS[kind] // self.model.config.vocab_size)
        start = 0
        while start < len(ordered):
            size = self.batch_size or max(1, tokens // len(ordered[start].inputs))
            size = min(size, self.max_batch_size or size)
            yield ordered[start : start + size]
            start += size

    @torch.no_grad()
    def _score(self, windows: Sequence[Window], disable_tqdm: bool) -> dict[Window, tuple[float, bool]]:
        """Sum of log p (nats) and greedy flag of every distinct window; no targets score (0, True)."""
        scored: dict[Window, tuple[float, bool]] = {}
        unique = list(dict.fromkeys(windows))
        todo = [window for window in unique if window.targets]
        scored.update((window, (0.0, True)) for window in unique if not window.targets)
        with tqdm(total=len(todo), desc="scoring", unit="request", leave=False, disable=disable_tqdm or None) as bar:
            for batch in self._batches(todo):
                scored.update(zip(batch, self._score_batch(batch), strict=True))
                bar.update(len(batch))
        return scored

    def _score_batch(self, batch: list[Window]) -> list[tuple[float, bool]]:
        length = max(len(window.inputs) for window in batch)
        # Right padding: no position of a causal model sees what comes after it.
        padded = [window.inputs + (self.eot_token_id,) * (length - len(window.inputs)) for window in batch]
        rows = [row for row, window in enumerate(batch) for _ in window.targets]
        positions = [len(w.inputs) - len(w.targets) + i for w in batch for i in range(len(w.targets))]
        targets = [target for window in batch for target in window.targets]
        rows_N, positions_N, targets_N = (
            torch.tensor(values, device=self._device) for values in (rows, positions, targets)
        )
        tokens_BT = torch.tensor(padded, device=self._device)
        requests = torch.tensor([window.request for window in batch])
        with self._autocast():
            log_p_N, greedy_N = score_positions(
                self.model, tokens_BT, rows_N, positions_N, targets_N, self.k, self.rng, requests, self.draws
            )
        counts = [len(window.targets) for window in batch]
        sums = [part.sum().item() for part in log_p_N.double().cpu().split(counts)]
        flags = [bool(part.all()) for part in greedy_N.cpu().split(counts)]
        return list(zip(sums, flags, strict=True))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _DTYPES[self.dtype]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to (and without) the first stop string, the end of the document or ``max_gen_toks``.

        Greedy unless the task sets ``do_sample`` or a temperature; ``top_p`` and ``top_k`` are honoured. A request that
        is repeated with sampling gets other draws each time.
        """
        repeats: Counter[tuple[str, str]] = Counter()
        done: dict[tuple[str, str, int], str] = {}
        results = []
        for request in tqdm(requests, desc="generating", unit="request", leave=False, disable=disable_tqdm or None):
            context, given = request.args
            options = normalize_gen_kwargs(given)
            content = (context, repr(sorted(given.items())))
            name = (*content, repeats[content] if options["do_sample"] else 0)
            repeats[content] += 1
            if name not in done:
                prompt = self.tok_encode(context) or [self.eot_token_id]
                done[name] = self._generate(prompt, options, key("generate", name[-1], *prompt))
                self.cache_hook.add_partial("generate_until", request.args, done[name])
            results.append(done[name])
        return results

    def _generate(self, prompt: list[int], options: dict[str, Any], request: int) -> str:
        # Sampling without a temperature is sampling from the model's own distribution.
        temperature = float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0
        sampling = Sampling(temperature, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0))
        with self._autocast():
            [text] = complete(
                self.model, self.tokenizer, [prompt[-self.max_length :]], self.k, options["max_gen_toks"], sampling,
                self.seed, [request], options["until"],
            )  # fmt: skip
        return str(text)
