"""Fuzzing: a few seconds of each target, the machinery that judges a case, and what it has found so far."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, load_script, synthetic_data
from safetensors.torch import save

from recurrent_db import load
from recurrent_db.arguments import MOST_LINE, one_line
from recurrent_db.config import config_from_json, load_config
from recurrent_db.data import ReadOptions, document, open_data, read_documents, readers
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.evaluation.answer_cache import HEADER, AnswerCache
from recurrent_db.files import file_digest, read_json, sealed
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sampling import draw
from recurrent_db.huggingface.source_folder import Weights
from recurrent_db.objectives import build_objective, load_objective_state
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.metrics import read_metrics, truncate_metrics
from recurrent_db.store.tensors import load_optimizer_tensors, load_weights

sys.path.insert(0, str(ROOT))  # the targets, and their inputs, are modules beside the command
fuzz: ModuleType = load_script("benchmarks/reliability/fuzz.py")
targets: ModuleType = load_script("benchmarks/reliability/fuzz_targets.py")
inputs: ModuleType = load_script("benchmarks/reliability/fuzz_inputs.py")

SECONDS_EACH = 2.0
"""Of processor time: two thirds seeded cases, one third by hypothesis."""


# ---------------------------------------------------------------------------------------------------------------------
# Cases


@pytest.mark.parametrize("name", list(fuzz.SHARES))
def test_nothing_but_a_line_comes_out(name: str, tmp_path: Path) -> None:
    outcome = fuzz.Outcome(name)
    target = targets.TARGETS[name](tmp_path)
    with fuzz.bounded():
        fuzz.seeded(target, outcome, 1, 0, 10**9, seconds=SECONDS_EACH * 2 / 3)
        tried = outcome.cases
        fuzz.by_hypothesis(target, outcome, 1, 10**6, seconds=SECONDS_EACH / 3)
    assert not outcome.failures, outcome.failures
    assert tried >= 10 and outcome.cases > tried
    assert outcome.cases < 500 or name == "repl" or 0 < outcome.refused < outcome.cases


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_a_million_cases() -> None:
    outcomes = fuzz.run_all(fuzz.FuzzArgs(cases=1_000_000, jobs=2))
    assert [outcome.target for outcome in outcomes] == list(targets.TARGETS)
    assert not [failure for outcome in outcomes for failure in outcome.failures]
    assert sum(outcome.cases for outcome in outcomes) >= 1_000_000


def test_shares_cover_all_targets_and_add_up() -> None:
    assert list(fuzz.SHARES) == list(targets.TARGETS)
    assert sum(fuzz.SHARES.values()) == pytest.approx(1)
    assert sum(fuzz.shares(1_000_000).values()) == 1_000_000


def test_a_case_is_a_function_of_its_number(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def case(self, rng: random.Random) -> None:
            self.seen.append(repr(inputs.altered(rng, {"a": [1, {"b": "c"}]})))

    all_of_them, later = Recorder(), Recorder()
    fuzz.seeded(all_of_them, fuzz.Outcome("x"), 0, 0, 20)
    fuzz.seeded(later, fuzz.Outcome("x"), 0, 15, 5)
    assert all_of_them.seen[15:] == later.seen and len(set(all_of_them.seen)) > 10
    from_bytes = [inputs.Bytes(bytes(range(200))) for _ in range(2)]
    assert len({repr(inputs.value(rng)) for rng in from_bytes}) == 1
    inputs.damaged(inputs.Bytes(b""), b"abc")  # no bytes are left: an end all the same


# ---------------------------------------------------------------------------------------------------------------------
# The judge: each of these must be called a failure


class Bad:
    """A target whose every case does one thing."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def case(self, rng: random.Random) -> None:
        self.act()


def raiser(error: BaseException) -> Callable[[], object]:
    def act() -> object:
        raise error

    return act


def spin() -> None:
    while True:
        pass


def swallow() -> None:
    with contextlib.suppress(Exception):
        spin()


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (raiser(ValueError("x")), "ValueError"),
        (raiser(SystemExit(2)), "SystemExit"),
        (raiser(UserError("")), "line of 0 characters"),
        (raiser(UserError("\n ")), "line of 0 characters"),
        (lambda: np.empty(1 << 40), "MemoryError"),
        (lambda: torch.empty(1 << 32, dtype=torch.uint8), "RuntimeError"),
        (lambda: bytearray(1 << 31), "MemoryError"),
        (spin, "TooLong"),
        (swallow, "TooLong"),
    ],
)
def test_what_is_no_line_is_a_failure(
    act: Callable[[], object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    outcome = fuzz.Outcome("bad")
    with fuzz.bounded():
        fuzz.seeded(Bad(act), outcome, 0, 0, 2)
    assert outcome.cases == 2 and len(outcome.failures) == 1 and outcome.failures[0]["cases"] == 2
    assert expected in outcome.failures[0]["what"]
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_a_mistake_is_no_failure() -> None:
    outcome = fuzz.Outcome("good")
    fuzz.seeded(Bad(raiser(UserError("no file x"))), outcome, 0, 0, 3)
    assert (outcome.cases, outcome.refused, outcome.failures) == (3, 3, [])


def test_hypothesis_shrinks_what_it_finds() -> None:
    class Picky:
        def case(self, rng: random.Random) -> None:
            if rng.getrandbits(16) >= 1000:
                raise KeyError("large")

    outcome = fuzz.Outcome("picky")
    fuzz.by_hypothesis(Picky(), outcome, 0, 2000)
    [failure] = outcome.failures
    assert int.from_bytes(bytes.fromhex(failure["case"])[:2], "little") in range(1000, 1032)


def test_a_process_that_dies_or_stands_still_is_a_failure_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, pathlib, signal, sys, time\n"
        "arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "first, count = int(arguments['--first']), int(arguments['--cases'])\n"
        "folder = pathlib.Path(arguments['--folder'])\n"
        "for number in range(first, first + count):\n"
        "    folder.with_name('config.at').write_bytes(number.to_bytes(8, 'little'))\n"
        "    if number == 3: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if number == 5: time.sleep(600)\n"
        "    done = {'target': 'config', 'cases': number + 1 - first}\n"
        "    folder.with_name('config.json').write_text(json.dumps(done))\n"
    )
    monkeypatch.setattr(fuzz, "__file__", str(worker))
    monkeypatch.setattr(fuzz, "STANDSTILL", 2.0)
    [outcome] = fuzz.run_all(fuzz.FuzzArgs(cases=8, target="config"))
    assert outcome.cases == 8
    assert [(failure["case"], failure["place"]) for failure in outcome.failures] == [(3, "process"), (5, "process")]
    assert "-11" in outcome.failures[0]["what"] and "no case finished" in outcome.failures[1]["what"]
    assert fuzz.failed(outcome) == 2 and "| config | 8 | 0 | 2 |" in fuzz.table([outcome])


def test_the_command_says_what_it_tried(script: Any) -> None:
    result = script("benchmarks/reliability/fuzz.py", "--target", "answers", "--cases", 50, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["tried"] == 50 and report["failures"] == 0 and report["targets"][0]["target"] == "answers"
    wrong = script("benchmarks/reliability/fuzz.py", "--target", "nothing")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What it found: one line each, where there was a traceback, a crash or a number without bound


def refused(words: str, action: Callable[..., object], *arguments: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        action(*arguments)
    line = one_line(str(caught.value))
    assert line.isprintable() and 0 < len(line) <= MOST_LINE


def test_a_line_cannot_command_a_terminal() -> None:
    assert one_line("a\x1b[2J\n\tb \ud800\u202e") == "a\ufffd[2J b \ufffd\ufffd"
    assert one_line("héllo “x” 日本") == "héllo “x” 日本"
    long = one_line("x" * 10**6)
    assert len(long) <= MOST_LINE and " ... " in long


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"optim": {"lr": 1' + "0" * 400 + "}}", "must be finite"),
        ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model": {"n_coda": 1000000000}}', "n_coda must be at most 1024"),
        ('{"objective": {"unrolled": {"mean_depth": 1000000000}}}', "mean_depth must be at most"),
        ('{"run": {"threads": 3000000000}}', "threads must be at most"),
    ],
)
def test_configurations_without_bound(text: str, words: str) -> None:
    refused(words, config_from_json, text, "config.json")


@pytest.mark.parametrize("text", ["seed = " + "9" * 5000, "seed = " + "[" * 5000, "\udc80"])
def test_toml_that_python_cannot_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    refused("not valid TOML", load_config, tmp_path / "c.toml")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return synthetic_data(tmp_path / "data", tokens=2000)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    values.pop("digest", None)
    path.write_text(sealed(values))


@pytest.mark.parametrize("name", ["\ud800", "a\x00b", "x" * 5000, "../x", "/etc/passwd", "a/../../x"])
def test_file_names_of_a_manifest(name: str, data: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["default"]["shards"][0]["offsets_file"] = name

    rewrite(data / "manifest.json", change)
    refused("outside the data directory|File name too long", open_data, data, "train")


def test_a_whole_number_of_many_digits_on_the_command_line() -> None:
    refused("run.log_every must fit into 64 bits", load_config, None, ["--run.log-every", "9" * 400])
    refused(
        "one_step.prior_iterations must be at most",
        load_config,
        None,
        ["--objective.one_step.prior_iterations", "9" * 10],
    )


def test_names_of_sources_in_a_manifest(data: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["a\ud800"] = manifest["splits"]["train"].pop("default")

    rewrite(data / "manifest.json", change)
    refused("is not a source name", open_data, data, "train")


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-320}, {"repetition_penalty": 1e-308}, {"repetition_penalty": 1e308, "temperature": 1e-300},
])  # fmt: skip
def test_no_setting_draws_a_token_that_is_none(settings: dict[str, float]) -> None:
    logits_V = torch.tensor([3.0, 5.0, -2.0, 5.0])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert 0 <= draw(logits_V, GenerationOptions(**settings), [0, 1, 2], u) < 4
    refused("not finite", draw, logits_V * math.nan, GenerationOptions(), [], 0.5)


def test_a_path_that_no_file_can_have() -> None:
    refused("File name too long", find_checkpoint, Path("x" * 5000))


def npy(header: str, body: bytes = b"") -> bytes:
    raw = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + body


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (2**60,), }"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,), }"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': ("),  # NumPy raises tokenize.TokenError
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", b"\x80\x04."),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (), }", bytes(8)),
        b"PK\x03\x04",  # NumPy raises zipfile.BadZipFile
        b"PK\x05\x06" + bytes(18),  # an archive of nothing: no array, and no error from NumPy
        b"\x80\x04]\x94.",
        b"",
    ],
)
def test_headers_of_offsets(content: bytes, data: Path) -> None:
    [path] = data.glob("train-*.offsets.npy")
    path.write_bytes(content)
    for verify in (False, True):

        def change(manifest: dict[str, Any]) -> None:
            manifest["splits"]["train"]["default"]["shards"][0]["offsets_sha256"] = file_digest(path)

        rewrite(data / "manifest.json", change)
        refused("not an array of offsets", open_data, data, "train", None, verify)


def test_offsets_that_go_back(data: Path) -> None:
    [path] = data.glob("train-*.offsets.npy")
    good = np.load(path)
    source = open_data(data, "train").sources["default"]
    assert [len(document(source, n)) for n in range(source.documents)] == np.diff(good).tolist()
    good[1], good[2] = good[2], good[1]
    np.save(path, good)

    def change(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["default"]["shards"][0]["offsets_sha256"] = file_digest(path)

    rewrite(data / "manifest.json", change)
    refused("does not fit its shard", open_data, data, "train", None, True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made: Tokenizer = targets.tiny_tokenizer()
    return made


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    made: Path = targets.tiny_run(tmp_path / "run", tokenizer, "denoise")
    return made


def swap(run: Path, name: str, content: bytes) -> Path:
    """Replace a file of the run's checkpoint by another that its manifest vouches for."""
    folder = find_checkpoint(run)
    (folder / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": file_digest(folder / name)}
    rewrite(folder / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))
    return folder


STATE = {"counters": {"step": 1}, "objective": {}, "ema_updates": 0}


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"\xff", b"[]", b"1", b"9" * 5000, b"[" * 100_000, b"{}",
        *(json.dumps(STATE | change).encode() for change in (
            {"counters": {"wings": 2}}, {"counters": []}, {"counters": {"step": "1"}}, {"counters": {"step": -1}},
            {"counters": {"seconds": float("nan")}}, {"counters": {"step": 1.5}}, {"counters": {"step": 10**400}},
            {"counters": {"step": True}}, {"objective": 3}, {"objective": {"sums": []}}, {"ema_updates": None},
            {"counters": {"flops": 1.0}}, {"counters": {"flops": {"forward": "1"}}}, {"counters": {"flops": {"wings": 1}}},
            {"counters": {"flops": {"update": -1.0}}}, {"counters": {"flops": {"causal": 10**400}}},
        )),
    ],
)  # fmt: skip
def test_states_of_training(content: bytes, run: Path) -> None:
    folder = swap(run, "state.json", content)
    refused(r"state\.json is not a valid state|the saved state of the objective", load, run, "cpu")
    swap(run, "state.json", json.dumps(STATE).encode())
    assert Checkpoint(folder).training()[0].step == 1
    load(run, "cpu")


@pytest.mark.parametrize("state", [{}, {"core_runs": 1}, {"core_runs": "x"}, {"core_runs": True, "more": 0}])
def test_states_of_an_objective(state: dict[str, Any]) -> None:
    config = load_config(None, ["--objective.name", "one_step"])
    refused("state of the objective does not fit OneStep", load_objective_state, build_objective(config), state, "x")


def test_weights_and_configurations_that_do_not_fit(run: Path) -> None:
    folder = find_checkpoint(run)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for content in (b"", b"\xff" * 64, (2**60).to_bytes(8, "little") + b"{}"):
        swap(run, "model.safetensors", content)
        refused("cannot be read as safetensors", load, run, "cpu")
    swap(run, "model.safetensors", save({"a": torch.zeros(2)}))
    refused("more layers than the weights have tensors|no parameter", load, run, "cpu")
    swap(run, "model.safetensors", good["model.safetensors"])

    with fuzz.bounded(1 << 25):  # a small file takes little, whatever a file may have
        read_json(folder / "manifest.json")
    # A configuration that claims a large model costs nothing: only shapes are compared.
    for key, value in (("n_core", 1000), ("vocab_size", 1 << 24), ("d_mlp", 1 << 20)):
        config = json.loads(good["config.json"])
        config["model"][key] = value
        swap(run, "config.json", json.dumps(config).encode())
        with fuzz.bounded(1 << 28):
            refused("more layers|has shape", load, run, "cpu")
    swap(run, "config.json", b'{"seed": "\xff"}')
    refused("seed", load, run, "cpu")
    swap(run, "config.json", good["config.json"])
    load(run, "cpu")

    model, _ = load(run, "cpu")
    whole = {name: torch.zeros(p.shape, dtype=torch.int32) for name, p in model.named_parameters()}
    refused("not floating-point numbers", load_weights, model, whole, "x")


def test_tokenizers_whose_pieces_are_no_text(tokenizer: Tokenizer) -> None:
    model = tokenizer.model_bytes.replace(b"\n\x02ef", b"\n\x02e\x81")
    assert model != tokenizer.model_bytes
    refused("a piece is not UTF-8", Tokenizer.from_bytes, model)


def test_optimizer_state_of_another_model(run: Path) -> None:
    model, _ = load(run, "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    name, parameter = next(iter(model.named_parameters()))
    for tensors in ({"exp_avg/wings": torch.zeros(1)}, {"x": torch.zeros(1)}, {f"exp_avg/{name}": torch.zeros(3)},
                    {f"exp_avg/{name}": torch.zeros(parameter.shape, dtype=torch.int64)}):  # fmt: skip
        refused("the optimizer state", load_optimizer_tensors, model, optimizer, tensors)
    assert not optimizer.state


def test_folders_to_import(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x" * 5000 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"not a plain \*\.safetensors file name", Weights, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused("70 dimensions", Weights, tmp_path)


def test_json_tables(tmp_path: Path) -> None:
    """A table nested a few thousand deep ended the process in the JSON reader of Arrow (a segmentation fault)."""
    path = tmp_path / "a.json"

    def texts() -> list[str]:
        return [found.text for found in read_documents(str(path))]

    for content, expected in (
        ('[{"text": "a"}, {"text": "b", "x": [1]}]', ["a", "b"]),
        ('\n\n [\n{"text": "a"}\n]\n', ["a"]),
        ('{"text": "a"}\n\n{"text": "b"}', ["a", "b"]),
    ):
        path.write_text(content)
        assert texts() == expected
    path.write_text('{"a":' * 5000)
    refused("nested too deeply|not a line of JSON", texts)
    path.write_text("[" * 200_000)
    refused("nested too deeply", texts)
    path.write_text('[{"text": "a"},')
    refused("not JSON", texts)
    path.write_text('{"text": ' + "9" * 5000 + "}")
    refused("not JSON", texts)


def test_no_line_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_CHARACTERS", 1 << 21)
    monkeypatch.setattr(readers, "MAX_TABLE_CHARACTERS", 1 << 21)
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARACTERS", 1 << 20)
    text = "x" * (5 << 20)
    for name, words in (("a.jsonl.gz", "line longer than 2 Mi"), ("b.json.gz", "longer than 2 Mi")):
        content = json.dumps({"text": text}) if name.startswith("a") else json.dumps([{"text": text}])
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        refused(words, lambda path=tmp_path / name: list(read_documents(str(path))))
    (tmp_path / "c.txt").write_text(text + "||" + text)
    parts = list(read_documents(str(tmp_path / "c.txt"), ReadOptions(document_separator="||")))
    assert "".join(part.text for part in parts) == text + text and max(len(part.text) for part in parts) <= 1 << 20
    # Lines are cut at the blocks' borders nowhere.
    lines = [json.dumps({"text": f"{n} " + "y" * (n % 977)}) for n in range(4000)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    assert [part.text for part in read_documents(str(tmp_path / "d.jsonl"))] == [
        json.loads(line)["text"] for line in lines
    ]


def test_kept_answers_and_metrics(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    owner = AnswerCache(path, {}).owner
    odd = [{"owner": owner, "asked": asked, "answer": 1} for asked in ({"a": 1}, [1], None, 3)]
    path.write_text("\n".join(json.dumps(line) for line in (HEADER, *odd, {"owner": owner, "asked": "x", "answer": 2})))
    assert AnswerCache(path, {}).answers == {"x": 2}
    rows = tmp_path / "metrics.jsonl"
    rows.write_bytes(b'{"step": 1}\n{"step": ' + b"9" * 5000 + b"}\n\xff\n")
    truncate_metrics(rows, 10)
    assert read_metrics(rows) == [{"step": 1}]
    rows.write_bytes(b'{"step": 1}\n' + b"[" * 100_000)
    assert read_metrics(rows) == [{"step": 1}]


def test_generation_options_of_a_task(run: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval.api.instance import Instance

    from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM

    model = RecurrentDBLM(str(run), k=1, device="cpu")

    def ask(**options: Any) -> list[str]:
        request = Instance("generate_until", {}, ("def", {"max_gen_toks": 2, **options}), 0)  # type: ignore[arg-type]
        return model.generate_until([request], disable_tqdm=True)

    for options in ({"max_gen_toks": float("inf")}, {"max_gen_toks": "x"}, {"max_gen_toks": -1}, {"temperature": []},
                    {"temperature": "warm"}, {"top_k": "many"}, {"top_p": [1]}, {"min_p": "x"}, {"until": [3]},
                    {"repetition_penalty": {}}, {"do_sample": True, "temperature": float("nan")}):  # fmt: skip
        refused("generation options|temperature must be", lambda options=options: ask(**options))
    assert len(ask(until=["\udc80", None], top_k="3", temperature="0.5")) == 1
    refused("exit must be kl", lambda: RecurrentDBLM(str(run), k=1, device="cpu", exit=["kl"]))  # type: ignore[arg-type]


def test_regular_expressions_of_the_readers_are_linear() -> None:
    """The one pattern that meets a stranger's bytes has no nested repetition."""
    from recurrent_db.data.shards import _NPY_HEADER

    near = (
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '<i8', 'fortran_order': False, 'shape': ("
        + b"1" * 10
        + b",), }"
        + b" " * 10**6
    )
    assert _NPY_HEADER.match(near) is None
    assert re.match(_NPY_HEADER, npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }")) is not None
