"""The model ``recurrent_db`` of the lm-eval harness: scores and continues the harness's requests with a checkpoint.

    python eval/lm_eval_cli.py --model recurrent_db --model_args checkpoint=RUN,k=8 --tasks ...

Importing this module registers the name. It needs the extra ``eval``. Scores come from `window_scorer` and text from
`generate.complete`, the same code that the other commands use.

- Inference starts from noise (or zeros), never from the answer. A ``denoise`` checkpoint at k = 1 is its read-out at
  sigma_max. At k > 1 the likelihood is averaged over ``draws`` noise draws of the walk with k steps.
- Results do not depend on batches, order, padding, shared prefixes or the number of processes: see `window_scorer`. The
  noise of a (context, continuation) pair is keyed by its context, so the choices of a question are compared under the
  same noise. The noise of a rolling window is keyed by the window, and the noise of a text by its prompt.
- A request longer than the window loses its left end, as in the harness's own models.
- If a token contains the border between context and continuation, the pair is cut at the end of the longest common prefix
  of the context's tokens and the whole text's tokens. The continuation's score then includes that token and no byte of
  the continuation is lost.
- Several processes (torchrun) each load the checkpoint and share the work. The harness sees one process, because it would
  divide the documents itself and then choose other few-shot examples for each number of processes.
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
from recurrent_db.evaluation.lm_eval_arguments import ModelArguments, limit_length, request_options
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

# Unless this is set, the harness bootstraps some errors (for example of a perplexity) in forked processes. A model that has
# run leaves threads behind, and a fork can wait forever for a lock that one of these threads holds.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

eval_logger = logging.getLogger("lm_eval.recurrent_db")

ANSWERS_VERSION = 1
"""Increase this number when the answer to a request changes for the same checkpoint. It invalidates stored answers."""


@register_model("recurrent_db")
class RecurrentDBLM(TemplateLM):
    """The harness's interface to a checkpoint. `lm_eval_arguments.ModelArguments` lists its arguments.

    Raises:
        UserError: an argument is unknown or out of range, or the checkpoint does not exist.
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
        """Make a denoiser's inference start at noise level ``sigma``. Returns the level; None for other objectives."""
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
        # A walk needs noise levels below its first one.
        if not (low < level <= high or (level == low and self.k == 1)):
            raise UserError(
                f"model argument sigma must be above this checkpoint's sigma_min = {low:g} and at most its "
                f"sigma_max = {high:g}, got {sigma!r}"
            )
        if level < high:
            self.model.recurrence = replace(walk, density=Below(walk.density, level))
        return level

    def choose(self, k: int) -> None:
        """Use ``k`` core iterations in the following requests."""
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
                "device": self._device.type,  # random numbers differ between GPU and CPU
            }
            if not self.options.plain:
                owner |= {"sampler": self.options.sampler, "exit": self.options.exit}
            self.scorer.answers = AnswerCache(self.arguments.cache, owner)

    def untrain(self, seed: int = 0) -> None:
        """Replace the weights by random initial ones, as training of this model would start with."""
        fresh = build_model(self.model.config, seed)
        self.model.load_state_dict(fresh.state_dict())
        self._weights = f"{self._weights} before training, seed {seed}"
        self.choose(self.k)

    def _warn(self, message: str, *values: Any) -> None:
        """Log a warning, once per message and only in the first process."""
        if self.processes.rank == 0 and (message, *values) not in self._warned:
            self._warned.add((message, *values))
            eval_logger.warning(message, *values)

    @property
    def _quiet(self) -> bool | None:
        """``disable`` argument for tqdm: a bar only in the first process, and there only at a terminal."""
        return None if self.processes.rank == 0 else True

    # -- properties that the harness reads ---------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The document separator. It precedes each text in training, and replaces an empty context here."""
        return self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"sentencepiece-{self.tokenizer.hash}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise UserError("a recurrent_db checkpoint has no chat template: leave --apply_chat_template out")

    def get_model_info(self) -> dict[str, Any]:
        """Entries that the harness adds to ``config`` in its results."""
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
        """Token ids of a text. There are no special tokens to add."""
        return self.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, which together are the tokens of the whole text.

        The context is never empty. White space at its end moves to the continuation, as in `TemplateLM`.
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
        """For each request: log p(continuation | context) in nats, and whether greedy decoding gives the continuation."""
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
                "of the continuation, so their score covers fewer tokens",
                cut, len(requests), self.max_length, lost,
            )  # fmt: skip
        scored = self.scorer.score(windows, show=not disable_tqdm)
        results = [scored[window] for window in windows]
        for (pair, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text in nats. The text is cut into windows of ``max_length`` tokens."""
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
        """Continue each context until the first stop string, the end of the document or ``max_gen_toks``.

        The stop string is left out. Decoding is greedy unless the task sets ``do_sample`` or a temperature. ``top_k``,
        ``top_p``, ``min_p``, ``repetition_penalty`` and ``max_length`` apply. Each repeat of a sampled request gets other
        random draws. All options are checked before the first text.

        Raises:
            UserError: an option is not supported or out of range.
        """
        repeats: Counter[tuple[str, str]] = Counter()
        names = []
        asked: dict[tuple[str, str, int], tuple[str, dict[str, Any]]] = {}
        for request in requests:
            context, given = request.args
            options = request_options(given, request.task_name)
            options = limit_length(options, len(self._prompt(context)), request.task_name)
            content = (context, repr(sorted(given.items())))
            names.append((*content, repeats[content] if options["temperature"] > 0 else 0))
            repeats[content] += 1
            asked.setdefault(names[-1], (context, options))
        # Sorted by options and length, so that batches are uniform and every process gets some of each length.
        order = sorted(asked, key=lambda name: (repr(asked[name][1]), -len(asked[name][0])))
        mine = self.processes.my_part(order)
        with tqdm(total=len(mine), desc="generating", unit="request", leave=False,
                  disable=disable_tqdm or self._quiet) as bar:  # fmt: skip
            made = self._texts([(*asked[name], name[-1]) for name in mine], bar.update)
        done = dict(zip(order, self.processes.merge(made), strict=True))
        for request, name in zip(requests, names, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, done[name])
        return [done[name] for name in names]

    def _prompt(self, context: str) -> list[int]:
        """Token ids of the prompt: the end of the context, or the document separator for an empty one."""
        return self.tok_encode(context)[-self.max_length :] or [self.eot_token_id]

    def _texts(self, asked: Sequence[tuple[str, dict[str, Any], int]], progress: Callable[[int], object]) -> list[str]:
        """Continuations of (context, options, number of the repeat), stored or new. Equal options share batches."""
        texts: dict[int, str] = {}
        prompts: list[list[int]] = []
        todo: dict[str, list[int]] = {}
        answers = self.scorer.answers
        for number, (context, options, repeat) in enumerate(asked):
            prompts.append(self._prompt(context))
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
        """The batch size to try after ``texts`` texts did not fit in the GPU's memory. Raises `UserError` after 1."""
        if texts == 1:
            raise UserError("one text does not fit in the GPU's memory: try a smaller max_length or dtype=bfloat16")
        self._warn("out of GPU memory with %d texts in a batch; continuing with fewer", texts)
        torch.cuda.empty_cache()
        return texts // 2

    def _generate(self, prompts: list[list[int]], request: dict[str, Any], keys: list[int]) -> list[str]:
        options = replace(self.options, **request)
        with self._autocast():
            texts = complete(self.model, self.tokenizer, prompts, options, keys, batch_size=len(prompts))
        return list(map(str, texts))
