"""Configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recurrent_db.config import Config, config_from_json, load_config, rows_of_vocabulary
from recurrent_db.errors import UserError
from recurrent_db.objective_config import DenoisePaperConfig
from recurrent_db.schema import keys, to_dict

pytestmark = pytest.mark.fast

CONFIGS = sorted((Path(__file__).parents[1] / "train/configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_parse_and_survive_json(path: Path) -> None:
    config = load_config(path)
    assert config_from_json(json.dumps(to_dict(config)), "") == config


def test_every_preset_is_there() -> None:
    assert {p.stem for p in CONFIGS} >= {
        "tiny",
        "pythia-70m-looped",
        "looped-1b",
        "huginn-3.5b",
        "gpt-blocks",
        "gpt-blocks-768",
    }


def test_there_are_few_keys() -> None:
    names = list(keys(Config))
    print(f"{len(names)} keys: {', '.join(names)}")
    assert len(names) == len(set(names)) <= 92
    contract = ["seed", "objective.name", "run.dir", "init.from", "blocks.only", "parallel.mode"]
    assert {*contract, "data.path", "data.val_path", "data.mixture"} <= set(names)
    assert {f"budget.{limit}" for limit in ("flops", "tokens", "steps", "seconds")} <= set(names)


def test_tiny_shows_how_to_choose_muon(tmp_path: Path) -> None:
    text = next(p for p in CONFIGS if p.stem == "tiny").read_text()
    (tmp_path / "c.toml").write_text(text.replace("# name =", "name ="))
    assert load_config(tmp_path / "c.toml").optim.name == "muon"


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('seed = 3\n[optim]\nlr = 1\n[init]\nfrom = "a"\n')
    config = load_config(path, ["--optim.lr", "0.5", "--budget.tokens", "4e6", "--data.mixture", "a", "1", "b", "2"])
    assert (config.seed, config.optim.lr, config.budget.tokens, config.init.from_) == (3, 0.5, 4e6, "a")
    assert config.data.mixture == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearnrate = 1", "unknown config key 'optim.learnrate'"),
        ("[optin]\nlr = 1", "did you mean 'optim'?"),
        ('[model]\nd_model = "wide"', "model.d_model must be a whole number, got 'wide'"),
        ("[model]\nd_model = true", "model.d_model must be a whole number, got True"),
        (
            "[objective.one_step]\natom = 0.1",
            "did you mean 'objective.denoise.atom' or 'objective.denoise_class.atom'?",
        ),
        ("[model]\nlr = 0.1", "did you mean 'optim.lr'?"),
        ('[objective]\nname = "denoyse"', "did you mean 'denoise'?"),
        ("[model]\nd_model = 100\nn_heads = 3", "not divisible by model.n_heads = 3"),
        ("[model]\nd_model = 12\nn_heads = 4", "must be even for RoPE"),
        ("[objective.denoise]\nsigma_min = 5\nsigma_max = 2", "sigma_min = 5.0 must be below sigma_max = 2.0"),
        ("[objective.unrolled]\nmean_depth = 0", "objective.unrolled.mean_depth must be above 0"),
        ("[eval]\nk = [0]", "eval.k must be 1 or more"),
        ("[data]\nsequence_length = 4096", "above model.max_seq_len"),
        (
            '[optim]\nname = "moun"',
            "config key optim.name must be one of adamw, muon, got 'moun'; did you mean 'muon'?",
        ),
        ("[optim]\nlr = -1", "optim.lr must be above 0"),
        ("[budget]\nflops = inf", "budget.flops must be finite"),
        ("[run]\npeak_flops = nan", "run.peak_flops must be above 0"),
        ("[run]\npeak_flops = 0", "run.peak_flops must be above 0"),
        ("model = 3", "model must be a table"),
        ("[model", "not valid TOML"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--objective.name", "denoyse"], "--objective.name takes one of one_step, denoise,"),
        (["--objective.name", "denoyse"], "got 'denoyse'; did you mean 'denoise'?"),
        (["--optim.lr"], "--optim.lr needs a value"),
        (["--optim.lr", "fast"], "--optim.lr takes a number, got 'fast'"),
        (["--eval.tokens", "1.5"], "--eval.tokens takes a whole number, got '1.5'"),
        (["--eval.tokens", "inf"], "--eval.tokens takes a whole number, got 'inf'"),
        (["--eval.k", "1,x"], "--eval.k takes whole numbers, separated by commas, got '1,x'"),
        (["--eval.k", "--seed", "1"], "--eval.k needs a value"),
        (["--data.mixture", "prose"], "--data.mixture takes pairs NAME=VALUE of a name and a number"),
        (
            ["--data.mixture", "prose=1,prose=2"],
            "--data.mixture takes pairs NAME=VALUE of a name and a number, separated by commas, each name once",
        ),
        (["--run.compile", "maybe"], "--run.compile takes true or false, got 'maybe'"),
        (["--optim.lr", "nan"], "optim.lr must be above 0, got nan"),
        (["--seed", "9223372036854775808"], "seed must fit into 64 bits"),
        (["--seed", "-1e20"], "seed must fit into 64 bits"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["100000", "100_000", "1e5", "1E+5", "100000.0", "+1_0e4"])
def test_whole_numbers_have_one_form_in_files_and_options(tmp_path: Path, word: str) -> None:
    (tmp_path / "c.toml").write_text(f"[eval]\ntokens = {word}")
    assert load_config(tmp_path / "c.toml") == load_config(None, ["--eval.tokens", word])
    assert load_config(None, [f"--eval.tokens={word}"]).eval.tokens == 100_000


@pytest.mark.parametrize("words", ["1,8", "1 8", "1, 8", "[1, 8]", "1,8,", "1 8e0"])
def test_a_list_is_separated_by_commas_or_spaces(words: str) -> None:
    assert load_config(None, ["--eval.k", *words.split(), "--seed", "3"]).eval.k == [1, 8]
    assert load_config(None, ["--eval.k", words]).eval.k == [1, 8]
    assert load_config(None, ["--seed", "3", *f"--eval.k={words}".split()]).eval.k == [1, 8]


def test_a_table_on_the_command_line() -> None:
    for words in (["prose=0.7,code=3e-1"], ["prose=0.7", "code=0.3"], ["prose", "0.7", "code", "0.3"]):
        assert load_config(None, ["--data.mixture", *words]).data.mixture == {"prose": 0.7, "code": 0.3}


def test_home_directories_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell: a leading ~, and variables. Pattern marks stay."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "here")
    text = '[run]\ndir = "~/runs/$PLACE/*"\n[data]\npath = "~"\nval_path = "a/~/b"\n[init]\nfrom = "~nobody-of-this-name/x"'
    (tmp_path / "c.toml").write_text(text)
    config = load_config("~/c.toml", ["--data.val_path=~/val"])
    assert (config.run.dir, config.data.path) == (f"{tmp_path}/runs/here/*", str(tmp_path))
    assert (config.data.val_path, config.init.from_) == (f"{tmp_path}/val", "~nobody-of-this-name/x")
    assert load_config(tmp_path / "c.toml").data.val_path == "a/~/b"
    assert load_config(None).run.dir == ""
    assert load_config(None, ["--run.dir", "$PLACE/x"]).run.dir == "$PLACE/x"  # the shell has expanded it already


def test_a_variable_that_is_not_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "c.toml").write_text('[run]\ndir = "${NOWHERE}/runs"')
    with pytest.raises(UserError, match=r"the variable \$\{NOWHERE\} in \$\{NOWHERE\}/runs is not set"):
        load_config(tmp_path / "c.toml")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("seed = 3\r\n", encoding="utf-8-sig")
    assert load_config(tmp_path / "c.toml").seed == 3


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config file"):
        load_config(tmp_path / "none.toml")


def test_flags_need_no_value() -> None:
    assert load_config(None, ["--data.document_mask", "false"]).data.document_mask is False
    assert load_config(None, ["--data.document_mask", "--seed", "2"]).data.document_mask is True


def test_the_paper_preset_fixes_the_constants() -> None:
    denoise = load_config(None, ["--objective.name", "denoise_paper"]).objective.own
    assert isinstance(denoise, DenoisePaperConfig)
    assert (denoise.p_mean, denoise.p_std, denoise.sigma_min, denoise.sigma_max) == (-1.2, 1.2, 0.002, 80.0)
    assert (denoise.sd, denoise.atom, denoise.mute) == (0.5, 0.0, False)


def test_the_paper_preset_has_choices_and_refuses_other_constants(tmp_path: Path) -> None:
    config = load_config(None, ["--objective.name", "denoise_paper", "--objective.denoise.grid", "karras"])
    assert config.objective.denoise_paper.grid == "karras"
    with pytest.raises(UserError, match=r"objective.denoise.p_mean = 0.1 contradicts .* fixes it at -1.2"):
        load_config(None, ["--objective.name", "denoise_paper", "--objective.denoise.p_mean", "0.1"])
    (tmp_path / "c.toml").write_text('[objective]\nname = "denoise_paper"\n[objective.denoise_paper]\np_mean = 0.1')
    with pytest.raises(UserError, match=r"did you mean 'denoise"):
        load_config(tmp_path / "c.toml")


def test_a_density_without_mass_is_refused() -> None:
    with pytest.raises(UserError, match="has no mass"):
        load_config(None, ["--objective.denoise.p_mean", "1000"])


def test_an_option_without_its_value_is_not_taken_for_a_flag() -> None:
    with pytest.raises(UserError, match=r"data\.path"):
        load_config(None, ["--data.path", "--seed", "2"])


@pytest.mark.parametrize(
    ("name", "conditioned", "silent", "rows"),
    [("next_token", False, False, 9), ("unrolled", False, False, 9), ("one_step", False, True, 9),
     ("denoise", True, False, 9), ("denoise_paper", True, False, 9), ("masked", True, False, 10)],
)  # fmt: skip
def test_the_model_follows_the_objective(name: str, conditioned: bool, silent: bool, rows: int) -> None:
    options = ["--model.n_blocks", "1", "--model.n_prelude", "0", "--model.n_coda", "0"] if name == "masked" else []
    config = load_config(None, ["--objective.name", name, *options])
    for again in (config, config_from_json(json.dumps(to_dict(config)), "")):
        assert (again.model.noise_conditioning, again.model.silent_state) == (conditioned, silent)
        assert rows_of_vocabulary(again, 9) == rows
    assert "noise_conditioning" not in to_dict(config)["model"]
    assert not {"next_token", "masked"} & set(to_dict(config)["objective"])


def test_saved_configuration_that_is_none_is_refused() -> None:
    for text in ("{", "[]", '{"no": 1}'):
        with pytest.raises(UserError):
            config_from_json(text, "x")
