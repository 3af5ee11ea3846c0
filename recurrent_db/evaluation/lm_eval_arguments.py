"""Checks the values that the lm-eval harness passes to `lm_eval_model`: model arguments and the options of requests.

The harness passes numbers either as numbers or as the strings that the user typed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from recurrent_db.errors import UserError
from recurrent_db.files import expand_user
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.schema import MOST_INTEGER, from_words

DTYPES = ("float32", "bfloat16")
GENERATION_ARGUMENTS = ("k", "seed", "sampler", "exit")
"""Generation options that are model arguments. The others come with each request."""


@dataclass(frozen=True)
class ModelArguments:
    """``--model_args checkpoint=RUN,k=8,...``: all fields except ``options``, and `GENERATION_ARGUMENTS`."""

    checkpoint: str
    """Run directory or checkpoint folder."""
    options: GenerationOptions
    """Generation options. Likelihoods use only its k and its seed (of the noise)."""
    sigma: float | str | None = None
    """Noise level at which a denoiser's inference starts; its sigma_max by default, which is also the upper limit. At k = 1
    it is the level of the only read-out, at k > 1 the first level of the walk. z starts as noise of this size, without the
    answer. At low levels the model therefore takes pure noise for signal."""
    draws: int = 1
    """Noise draws averaged in a likelihood. Inference without noise ignores it."""
    batch_size: int | None = None
    """Sequences in a batch. None ("auto", "auto:N"): as many as have 1,024 tokens (GPU: 32,768) and 2^26 logits (GPU: 2^28).
    If a batch does not fit in the GPU's memory, it is halved."""
    max_batch_size: int | None = None
    """Largest number of sequences in a batch."""
    max_length: int | None = None
    """Window in tokens; the model's by default, which is also the upper limit."""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast as in training."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    prefix_reuse: bool = True
    """Compute shared prefixes of requests once (for example the question before its choices)."""
    cache: Path | None = None
    """JSON Lines file that stores answers and reuses stored ones (`answer_cache`). Answers are keyed by the checkpoint's
    content and everything else that changes them."""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> ModelArguments:
        """Parse the harness's arguments. Raises `UserError` for one that is unknown or out of range."""
        values = {name: value for name, value in given.items() if name != "trust_remote_code"}  # an argument of tasks
        known = [*(field.name for field in fields(cls) if field.name != "options"), *GENERATION_ARGUMENTS]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise UserError(f"unknown model argument {name!r}; {hint}")
        if not values.get("checkpoint"):
            raise UserError("the model needs a run: --model_args checkpoint=RUN,k=8")
        if re.fullmatch(r"auto(:\d+(\.\d+)?)?", str(values.get("batch_size"))):
            values["batch_size"] = None
        for name, least in (
            ("k", 1),
            ("seed", 0),
            ("draws", 1),
            ("batch_size", 1),
            ("max_batch_size", 1),
            ("max_length", 1),
        ):
            if values.get(name) is not None:
                values[name] = _whole_number(name, values[name], least)
        if "prefix_reuse" in values:
            values["prefix_reuse"] = _truth("model argument prefix_reuse", values["prefix_reuse"])
        if values.get("dtype", "float32") not in DTYPES:
            raise UserError(f"model argument dtype must be one of {', '.join(DTYPES)}, got {values['dtype']!r}")
        for name, kind in (("checkpoint", str), ("sampler", str), ("exit", str), ("device", str), ("cache", Path)):
            if values.get(name) is not None:
                values[name] = kind(str(values[name]))
        for name in ("checkpoint", "cache"):
            if values.get(name) is not None:
                values[name] = type(values[name])(expand_user(str(values[name])))
        chosen = {name: values.pop(name) for name in GENERATION_ARGUMENTS if name in values}
        return cls(**values, options=GenerationOptions(temperature=0.0, **chosen))


def _whole_number(name: str, value: Any, least: int) -> int:
    try:
        number: int = from_words([str(value)], int)
    except ValueError:
        number = least - 1
    if not least <= number <= MOST_INTEGER:
        raise UserError(f"model argument {name} must be a whole number of {least} or more, got {value!r}")
    return number


def _truth(name: str, value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise UserError(f"{name} must be true or false, got {value!r}")
    return str(value).lower() == "true"


LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The harness's names for the largest number of new tokens."""
DEFAULT_LIMIT = 256
"""Largest number of new tokens of a task that sets none, as in the harness."""
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Options with the same name here and in the harness."""
WITHOUT_EFFECT = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "typical_p": 1,
}
"""Options that are not supported, and the value that switches each of them off. Tasks of the harness set some of them so."""


def request_options(given: Mapping[str, Any], task: str | None = None) -> dict[str, Any]:
    """A request's generation options under the names of `GenerationOptions`, as JSON. They are part of an answer's key.

    ``max_length``, which limits prompt and text together, keeps its name: `limit_length` resolves it.

    Raises:
        UserError: an option is not supported or its value is invalid. It comes from the task's file or from --gen_kwargs.
    """
    try:
        return _request_options({name: value for name, value in given.items() if value is not None})
    except UserError as error:
        raise UserError(f"generation options{f' of task {task}' if task else ''}: {error}") from None


def _request_options(given: Mapping[str, Any]) -> dict[str, Any]:
    known = ("until", "do_sample", "max_length", *LIMITS, *NUMBERS)
    for name, value in given.items():
        if name not in known and (WITHOUT_EFFECT.get(name) != value or isinstance(value, bool)):
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else f"supported: {', '.join(known)}"
            raise UserError(f"{name} = {value!r} is not supported; {hint}")
    options: dict[str, Any] = {name: _number(name, given[name]) for name in NUMBERS if name in given}
    GenerationOptions().changed(**options)  # refuses values out of range, also where greedy decoding needs none of them
    # Sampling without a temperature is sampling from the model's own distribution.
    sampled = _truth("do_sample", given.get("do_sample", options.get("temperature", 0) > 0))
    options["temperature"] = options.get("temperature", 1.0) if sampled else 0.0
    limits = {name: _count(name, given[name], 0) for name in LIMITS if name in given}
    if len(set(limits.values())) > 1:
        raise UserError(f"{' and '.join(limits)} differ, but they all limit the new tokens: set only one of them")
    if "max_length" in given:
        options["max_length"] = _count("max_length", given["max_length"], 1)
    if limits or "max_length" not in given:
        options["max_new_tokens"] = next(iter(limits.values()), DEFAULT_LIMIT)
    until = given.get("until", [])
    options["stop"] = [stop for stop in ([until] if isinstance(until, str) else _listed(until)) if stop is not None]
    if not all(isinstance(stop, str) for stop in options["stop"]):
        raise UserError(f"until must be a text or a list of texts, got {until!r}")
    return options


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _number(name: str, value: Any) -> float:
    if name == "top_k":
        return _count(name, value, 0)
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{name} must be a number, got {value!r}") from None


def _count(name: str, value: Any, least: int) -> int:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not (least <= number <= MOST_INTEGER and number.is_integer()):
        raise UserError(f"{name} must be a whole number of {least} or more, got {value!r}")
    return int(number)


def limit_length(options: Mapping[str, Any], prompt_tokens: int, task: str | None = None) -> dict[str, Any]:
    """`request_options` with ``max_length`` turned into a limit of new tokens. Raises `UserError` if it leaves no room."""
    if "max_length" not in options:
        return dict(options)
    limited = dict(options)
    room = limited.pop("max_length") - prompt_tokens
    if room < 1:
        raise UserError(
            f"generation options{f' of task {task}' if task else ''}: max_length = {options['max_length']} leaves no room"
            f" after a prompt of {prompt_tokens} tokens: raise it, or set max_gen_toks instead"
        )
    limited["max_new_tokens"] = min(room, limited.get("max_new_tokens", room))
    return limited
