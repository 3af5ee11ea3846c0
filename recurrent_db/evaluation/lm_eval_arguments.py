"""Checks the values that the lm-eval harness passes to `lm_eval_model`: model arguments and the options of requests.

The harness passes numbers either as numbers or as the strings that the user typed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
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
            values["prefix_reuse"] = _truth("prefix_reuse", values["prefix_reuse"])
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
        raise UserError(f"model argument {name} must be true or false, got {value!r}")
    return str(value).lower() == "true"


def request_options(given: dict[str, Any]) -> dict[str, Any]:
    """A request's generation options under the harness's names, with numbers converted. They are part of an answer's key.

    Raises:
        UserError: an option is invalid. It comes from the task's file.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    try:
        options: dict[str, Any] = dict(normalize_gen_kwargs(given))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if options.get(name) is not None:
                options[name] = float(options[name])
        if options.get("top_k") is not None:
            options["top_k"] = int(options["top_k"])
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"generation options of the task {given}: {error}") from None
    if options["max_gen_toks"] < 0:
        raise UserError(
            f"generation options of the task: max_gen_toks must be 0 or more, got {options['max_gen_toks']}"
        )
    options["until"] = [stop for stop in options["until"] if stop is not None]
    if not all(isinstance(stop, str) for stop in options["until"]):
        raise UserError(
            f"generation options of the task: until must be text or a list of texts, got {options['until']}"
        )
    return options


def with_request_options(options: GenerationOptions, request: dict[str, Any]) -> GenerationOptions:
    """``options`` with the request's own (from `request_options`). Raises `UserError` for a value out of range."""
    return replace(
        options,
        # Sampling without a temperature is sampling from the model's own distribution.
        temperature=float(request.get("temperature", 1.0)) if request["do_sample"] else 0.0,
        top_k=int(request.get("top_k") or 0),
        top_p=float(request.get("top_p") or 1.0),
        min_p=float(request.get("min_p") or 0.0),
        repetition_penalty=float(request.get("repetition_penalty") or 1.0),
        max_new_tokens=request["max_gen_toks"],
        stop=tuple(request["until"]),
    )
