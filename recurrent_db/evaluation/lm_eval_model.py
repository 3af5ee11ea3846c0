"""A checkpoint as a model of the lm-eval harness, under the name ``recurrent_db``.

    python eval/lm_eval_cli.py --model recurrent_db --model_args checkpoint=RUN,k=8 --tasks ...

Importing this module registers the name; it needs the extra ``eval``. Scores come from `window_scorer` and text from
`generate.complete`, so the harness sees the model that every other command sees.

- A ``denoise`` checkpoint at k = 1 is its read-out at sigma_max; at k > 1 it is the k-step walk's mixture over
  ``draws`` noise draws. Scoring starts from noise (or zeros), never from the answer.
- Results do not depend on batches, order, padding, shared prefixes or the number of processes: see `window_scorer`. The
  noise of a (context, continuation) pair is keyed by the context, so the choices of one question are compared under the
  same noise; that of a rolling window by the window; that of a text by its prompt.
- A request longer than the window keeps its right end, as in the harness's own models.
- Where a token straddles the border of context and continuation, the pair is cut after the longest common prefix of the
  tokens of the context and those of the whole text. The continuation's score then includes the straddling token, and no
  byte of the continuation is lost.
- Several processes (torchrun) each load the checkpoint and share out the work among themselves. The harness sees one
  process: its own way of dividing, by documents, would draw other few-shot examples for each number of processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from recurrent_db.denoise.noise import Below
from recurrent_db.distributed.work_sharing import Processes
from recurrent_db.errors import UserError
from recurrent_db.evaluation.answer_cache import AnswerCache, fingerprint
from recurrent_db.evaluation.lm_eval_arguments import ModelArguments, request_options, with_request_options
from recurrent_db.evaluation.window_scorer import Result, Window, WindowScorer
from recurrent_db.generation.generate import BATCH_SIZE, complete
from recurrent_db.generation.samplers import check_served
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng, key
from recurrent_db.store.folder import content_hash
from recurrent_db.store.loading import load_with_config

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f'the lm-eval harness is not installed ({error}): pip install "recurrent-db[eval]"') from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# The harness bootstraps errors (of a perplexity, say) in forked processes unless this is set. A model that has run leaves
# threads behind, and a fork of a process with threads can wait for ever for a lock that one of them held.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

eval_logger = logging.getLogger("lm_eval.recurrent_db")

ANSWERS_VERSION = 1
"""To be raised when the same request to the same checkpoint gets another answer than before: kept answers are then void."""


@register_model("recurrent_db")
class RecurrentDBLM(TemplateLM):
    """The harness's model. Its arguments are those of `lm_eval_arguments.ModelArguments`.

    Raises:
        UserError: an argument that is unknown or out of range, or no checkpoint there.
    """

    def __init__(self, checkpoint: str = "", **given: Any) -> None:
        super().__init__()
        self.arguments = ModelArguments.parse({"checkpoint": checkpoint, **given})
        self.options = self.arguments.options
        self._warned: set[tuple[Any, ...]] = set()
        self.processes, device = Processes.join(), self.arguments.device
        if self.processes.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', self.processes.rank)) % torch.cuda.device_count()}"
        self.model, self.tokenizer, self.run_config, self.checkpoint = load_with_config(
            self.arguments.checkpoint, device
        )
        check_served(self.model, self.options)
        self._device = self.model.embedding.weight.device
        window = self.model.config.max_seq_len
        self.max_length = self.arguments.max_length or window
        if self.max_length > window:
            raise UserError(
                f"model argument max_length = {self.max_length} is above the model's window of {window} tokens"
            )
        self.objective = self.run_config.objective.name
        self.sigma = self._start_at(self.arguments.sigma)
        self.scorer = WindowScorer(
            self.model,
            self.k,
            self.arguments.draws if self.model.recurrence.stochastic else 1,
            Rng(self.options.seed, EVALUATION_STEP),
            self.eot_token_id,
            self.arguments.batch_size,
            self.arguments.max_batch_size,
            self.arguments.prefix_reuse,
            self.processes,
            autocast=self._autocast,
        )
        self._weights = content_hash(self.checkpoint)
        self.choose(self.k)
        if build_objective(self.run_config).flat and self.k > 1:
            self._warn("%s was trained at K = 1 (next_token) and is evaluated at K = %d", checkpoint, self.k)

    @property
    def k(self) -> int:
        """Core iterations."""
        return self.options.k

    def _start_at(self, sigma: float | str | None) -> float | None:
        """Make a denoiser's inference start from ``sigma``; where it starts (None: there is no noise level)."""
        walk = self.model.recurrence.walk
        if walk is None:
            if sigma is not None:
                article = "an" if self.objective[0] in "aeiou" else "a"
                raise UserError(
                    f"model argument sigma: {article} {self.objective} checkpoint has no noise level to start from"
                )
            return None
        low, high = walk.density.sigma_min, walk.density.sigma_max
        try:
            level = high if sigma is None else float(sigma)
        except ValueError:
            level = float("nan")
        # A walk needs room below its top.
        if not (low < level <= high or (level == low and self.k == 1)):
            raise UserError(
                f"model argument sigma must be above this checkpoint's sigma_min = {low:g} and at most its "
                f"sigma_max = {high:g}, got {sigma!r}"
            )
        if level < high:
            self.model.recurrence = replace(walk, density=Below(walk.density, level))
        return level

    def choose(self, k: int) -> None:
        """Evaluate at ``k`` from now on."""
        self.options, self.scorer.k = replace(self.options, k=k), k
        if self.arguments.cache is not None:
            owner = {
                "version": ANSWERS_VERSION,
                "checkpoint": self._weights,
                "k": k,
                "sigma": self.sigma,
                "draws": self.scorer.draws,
                "seed": self.options.seed,
                "dtype": self.arguments.dtype,
                "device": self._device.type,  # a GPU draws other noise than a CPU
            }
            if not self.options.plain:
                owner |= {"sampler": self.options.sampler, "exit": self.options.exit}
            self.scorer.answers = AnswerCache(self.arguments.cache, owner)

    def untrain(self, seed: int = 0) -> None:
        """Replace the weights by the ones that training of this model could have started from."""
        fresh = build_model(self.model.config, seed)
        self.model.load_state_dict(fresh.state_dict())
        self._weights = f"{self._weights} before training, seed {seed}"
        self.choose(self.k)

    def _warn(self, message: str, *values: Any) -> None:
        """A warning, once for all processes and however often."""
        if self.processes.rank == 0 and (message, *values) not in self._warned:
            self._warned.add((message, *values))
            eval_logger.warning(message, *values)

    @property
    def _quiet(self) -> bool | None:
        """For tqdm: no bar, or one where there is a terminal."""
        return None if self.processes.rank == 0 else True

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
            "sigma": self.sigma,
            "draws": self.scorer.draws,
            "noise_seed": self.options.seed,
            "processes": self.processes.world,
            "prefix_reuse": self.scorer.reuse,
            "max_length": self.max_length,
            "model_dtype": self.arguments.dtype,
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
    ) -> list[Result]:
        windows = []
        for _, context, continuation in requests:
            kept = (context + continuation)[-(self.max_length + 1) :]
            targets = kept[1:][-len(continuation) :] if continuation else []
            windows.append(Window(tuple(kept[:-1]), tuple(targets), key("loglikelihood", *context)))
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        lost = sum(len(continuation) > self.max_length for _, _, continuation in requests)
        if cut:
            self._warn(
                "%d of %d requests are longer than the window of %d tokens and lose their left end; %d of them lose part "
                "of the continuation, whose score then covers fewer tokens",
                cut, len(requests), self.max_length, lost,
            )  # fmt: skip
        scored = self.scorer.score(windows, show=not disable_tqdm)
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
        scored = self.scorer.score([w for windows in windows_by_text for w in windows], show=not disable_tqdm)
        results = [sum(scored[window][0] for window in windows) for windows in windows_by_text]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return [float(result) for result in results]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.arguments.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to (and without) the first stop string, the end of the document or ``max_gen_toks``.

        Greedy unless the task sets ``do_sample`` or a temperature; ``top_k``, ``top_p``, ``min_p`` and
        ``repetition_penalty`` are honoured. A request that is repeated with sampling gets other draws each time.
        """
        repeats: Counter[tuple[str, str]] = Counter()
        names = []
        asked: dict[tuple[str, str, int], tuple[str, dict[str, Any]]] = {}
        for request in requests:
            context, given = request.args
            options = request_options(given)
            content = (context, repr(sorted(given.items())))
            names.append((*content, repeats[content] if options["do_sample"] else 0))
            repeats[content] += 1
            asked.setdefault(names[-1], (context, options))
        # Like of length together; every process takes some of each.
        order = sorted(asked, key=lambda name: (repr(asked[name][1]), -len(asked[name][0])))
        mine = self.processes.my_part(order)
        with tqdm(total=len(mine), desc="generating", unit="request", leave=False,
                  disable=disable_tqdm or self._quiet) as bar:  # fmt: skip
            made = self._texts([(*asked[name], name[-1]) for name in mine], bar.update)
        done = dict(zip(order, self.processes.merge(made), strict=True))
        for request, name in zip(requests, names, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, done[name])
        return [done[name] for name in names]

    def _texts(self, asked: Sequence[tuple[str, dict[str, Any], int]], progress: Callable[[int], object]) -> list[str]:
        """Continuations of (context, options, number of the repeat), kept or new. Equal options share batches."""
        texts: dict[int, str] = {}
        prompts: list[list[int]] = []
        todo: dict[str, list[int]] = {}
        answers = self.scorer.answers
        for number, (context, options, repeat) in enumerate(asked):
            prompts.append(self.tok_encode(context) or [self.eot_token_id])
            kept = answers.get(["text", prompts[-1], options, repeat]) if answers else None
            if isinstance(kept, str):
                texts[number] = kept
            else:
                todo.setdefault(repr(options), []).append(number)
        progress(len(texts))
        size = self.scorer.batch_size or BATCH_SIZE
        size = min(size, self.scorer.max_batch_size or size)
        for numbers in todo.values():
            numbers.sort(key=lambda number: -len(prompts[number]))
            while numbers:
                batch = numbers[:size]
                options = asked[batch[0]][1]
                keys = [key("generate", asked[number][2], *prompts[number]) for number in batch]
                try:
                    new = self._generate([prompts[number] for number in batch], options, keys)
                except torch.OutOfMemoryError:
                    new = []
                if not new:
                    size = self._fewer(len(batch))
                    continue
                del numbers[:size]
                texts.update(zip(batch, new, strict=True))
                if answers is not None:
                    each = [(["text", prompts[n], options, asked[n][2]], texts[n]) for n in batch]
                    answers.add({fingerprint(request): text for request, text in each})
                progress(len(batch))
        return [texts[number] for number in range(len(asked))]

    def _fewer(self, texts: int) -> int:
        """How many texts to generate at once where the GPU's memory did not hold ``texts``."""
        if texts == 1:
            raise UserError("the GPU's memory does not hold one text: a smaller max_length or dtype=bfloat16 may fit")
        self._warn("out of GPU memory with %d texts at once; going on with fewer", texts)
        torch.cuda.empty_cache()
        return texts // 2

    def _generate(self, prompts: list[list[int]], request: dict[str, Any], keys: list[int]) -> list[str]:
        options, cut = with_request_options(self.options, request), [prompt[-self.max_length :] for prompt in prompts]
        with self._autocast():
            texts = complete(self.model, self.tokenizer, cut, options, keys, batch_size=len(prompts))
        return list(map(str, texts))
