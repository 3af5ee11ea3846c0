"""Command lines: one form for numbers, lists and paths, and one line for a mistake."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
import tyro
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recurrent_db.arguments import Names, parse
from recurrent_db.config import Config, config_from_json, load_config
from recurrent_db.data.sources import parse_source
from recurrent_db.errors import UserError
from recurrent_db.evaluation.lm_eval_arguments import ModelArguments
from recurrent_db.schema import Count, PositiveInt, Share, at_least, keys, to_dict
from recurrent_db.store.loading import load

pytestmark = pytest.mark.fast


@dataclass
class Args:
    """The arguments of a script."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    k: tuple[PositiveInt, ...] = (1, 4)
    """Values of K."""
    tokens: Count = 16
    """Tokens."""
    limit: Annotated[int | None, at_least(1)] = None
    """Limit."""
    share: Share = 0.5
    """Share."""
    tasks: Names = ("one", "two")
    """Tasks."""
    bridge: tuple[Literal["soft", "hard"], ...] = ()
    """Bridges."""
    text_key: str = "text"
    """Key."""
    load: list[Path] = field(default_factory=list)
    """Files."""
    batch_size: PositiveInt = 2
    """Batch."""
    quick: bool = False
    """Flag."""


def read(*words: str) -> Args:
    return parse(Args, words)


def test_numbers_lists_and_names() -> None:
    assert read("RUN") == Args(Path("RUN"))
    for words in (
        ["--k", "1,2,8", "RUN"],
        ["--k", "1", "2", "8", "RUN"],
        ["RUN", "--k=1,2", "8"],
        ["--k", "[1, 2, 8]", "RUN"],
    ):
        assert read(*words).k == (1, 2, 8), words
    found = read("RUN", "--tokens", "1e6", "--limit", "2_000", "--share", "1e-1", "--batch_size=3.0")
    assert (found.tokens, found.limit, found.share, found.batch_size) == (1_000_000, 2000, 0.1, 3)
    assert read("RUN", "--limit", "None").limit is None
    assert read("RUN", "--tasks", "blimp_*,piqa", "--bridge", "hard").tasks == ("blimp_*", "piqa")
    assert read("RUN", "--bridge", "hard,soft").bridge == ("hard", "soft")
    assert read("RUN", "--text-key", "true").text_key == "true"
    assert read("--quick", "--k", "3", "RUN") == Args(Path("RUN"), k=(3,), quick=True)


def test_a_home_directory_is_expanded_in_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read("~/run", "--load", "~/a", "b/~", "--text-key", "~")
    assert (found.run, found.load, found.text_key) == (tmp_path / "run", [tmp_path / "a", Path("b/~")], "~")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "1.5"], "--tokens takes a whole number, got '1.5'"),
        (["--tokens", "-1"], "--tokens must be 0 or more, got -1"),
        (["--tokens", "nan"], "--tokens takes a whole number, got 'nan'"),
        (["--tokens", "1e19"], "--tokens must fit into 64 bits"),
        (["--tokens", "9" * 5000], "--tokens takes a whole number"),
        (["--tokens", ""], "--tokens takes a whole number, got ''"),
        (["--tokens"], "--tokens needs a value"),
        (["--limit", "0"], "--limit must be 1 or more, got 0"),
        (["--limit", "few"], "--limit takes a whole number, got 'few'"),
        (["--share", "inf"], "--share must be in [0, 1], got inf"),
        (["--share", "half"], "--share takes a number, got 'half'"),
        (["--batch_size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--k", "1,x"], "--k takes whole numbers, separated by commas, got '1,x'"),
        (["--k", "0"], "--k must be 1 or more, got 0"),
        (["--k", ","], "--k takes whole numbers, separated by commas, got ','"),
        (["--tasks", ""], "--tasks takes names, separated by commas, got ''"),
        (["--bridge", "soft,hart"], "--bridge takes some of soft, hard, separated by commas, got 'soft,hart'"),
        (["--quick", "maybe"], "--quick takes true or false, got 'maybe'"),
    ],
)
def test_a_mistake_names_the_option_and_what_it_takes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)) as error:
        read("RUN", *words)
    assert "\n" not in str(error.value)


def test_home_directories_where_no_shell_expands_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_source("books=~/books") == ("books", f"{tmp_path}/books")
    assert parse_source("~/books") == ("default", f"{tmp_path}/books")
    found = ModelArguments.parse({"checkpoint": "~/run", "cache": "~/answers", "k": "1e1", "batch_size": "1_0"})
    assert (found.checkpoint, found.cache, found.options.k, found.batch_size) == (
        f"{tmp_path}/run",
        tmp_path / "answers",
        10,
        10,
    )
    with pytest.raises(UserError, match=f"no run directory or checkpoint {tmp_path}/nowhere"):
        load("~/nowhere", device="cpu")
    with pytest.raises(UserError, match="device 'meta' is not supported"):
        load("~/nowhere", device=torch.device("meta"))


def test_a_saved_configuration_may_begin_with_a_byte_order_mark() -> None:
    assert config_from_json('\ufeff{"seed": 3}', "config.json").seed == 3


NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(-(1 << 64), 1 << 64).map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["1e3", "1_0", "2.0", "1.5", "9223372036854775807", "9223372036854775808", "-0", "1,4", "inf", "1e400"]
    ),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(set(keys(Config)) - {"data.mixture"})), NUMBERS)
@example("seed", "99999999999999999999")
@example("seed", "-9223372036854775808")
@example("budget.flops", "100000000000000000000")
def test_what_can_be_set_can_be_saved_and_read(key: str, word: str) -> None:
    """Any number for any key is either a configuration that its file gives back, or one line."""
    try:
        config = load_config(None, [f"--{key}={word}"])
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert to_dict(config_from_json(json.dumps(to_dict(config)), "again")) == to_dict(config)
