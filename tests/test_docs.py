"""The documentation: the site builds, names what exists, and its code blocks run.

Every block is one of: ``sh``, ``python`` or ``toml``, which a test runs or reads; ``text`` or ``json``, which is output. A
block that no test runs has its reason in a comment before it, and one that another test runs has that test's name
(`doc_pages`).
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
from doc_pages import LANGUAGES, PAGES, REASONS, Block, Runner, blocks, smaller
from helpers import ROOT

from recurrent_db.config import Config, load_config
from recurrent_db.schema import keys
from recurrent_db.training.trainer import train

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [page for page in PAGES if any(block.runs_here for block in blocks(page))]


# -- the site ----------------------------------------------------------------------------------------------------------


def build_site(folder: Path) -> list[str]:
    """Build the site as `make docs` does; its warnings, which end `make docs`."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load_site

    warnings: list[str] = []

    class Warnings(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    handler, logger = Warnings(logging.WARNING), logging.getLogger("mkdocs")
    logger.addHandler(handler)
    try:
        build(load_site(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        logger.removeHandler(handler)
    return warnings


def test_the_site(tmp_path: Path) -> None:
    """It builds without a warning, loads nothing from the network, and its reference has the docstrings."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra `docs` is not installed")
    site = tmp_path / "site"
    assert build_site(site) == []
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="?(https?:[^" >]*)', page.read_text())
        assert loaded == [], page.name
    for page, name in {
        "front-door": "recurrent_db.store.loading.load",
        "configuration": "recurrent_db.config.OptimConfig.lr",
        "objectives": "recurrent_db.objectives.base.Objective.passes",
        "recurrence": "recurrent_db.model.recurrence.Recurrence.hidden",
        "generation": "recurrent_db.generation.options.GenerationOptions.top_p",
        "evaluation": "recurrent_db.evaluation.likelihood.score",
        "accounting": "recurrent_db.accounting.flops.step_cost",
        "blocks": "recurrent_db.denoise.convert.convert",
        "data": "recurrent_db.data.loader.Loader.batch",
    }.items():
        assert f'id="{name}"' in (site / f"reference/{page}.html").read_text(encoding="utf-8"), page


def test_the_reference_has_every_section_of_the_configuration() -> None:
    sections = re.findall(r"^## \[([\w.]+)\]$", (ROOT / "docs/reference/configuration.md").read_text(), re.MULTILINE)
    assert {key.rpartition(".")[0] for key in keys(Config)} - {"", *sections} == set()


# -- the code blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_says_how_it_is_run(block: Block) -> None:
    assert block.language in LANGUAGES, f"the block is in no language of {', '.join(LANGUAGES)}"
    if block.run_by:
        assert (ROOT / block.run_by).is_file()
    if block.not_run:
        reason = next((reason for reason in REASONS if block.not_run.startswith(reason)), None)
        assert reason is not None, f"{block.not_run!r} is no reason of {', '.join(REASONS)}"
        if reason == "takes minutes":
            named = re.fullmatch(r"takes minutes \((?:make ([\w-]+)|(tests/[\w/]+\.py))\)", block.not_run)
            assert named is not None, "name what runs it: takes minutes (make TARGET), or (tests/FILE.py)"
            target, test = named.groups()
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert (ROOT / test).is_file() if test else re.search(f"^{target}:", makefile, re.MULTILINE)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer_path: Path, data_dir: Path) -> Path:
    """What pages take as given: a folder of text, its tokenizer and shards, and the runs of small models."""
    home = tmp_path_factory.mktemp("home")
    (home / "books").mkdir()
    for number, text in enumerate(texts):
        (home / f"books/{number}.txt").write_bytes(text.encode())
    shutil.copy(tokenizer_path, home / "books.model")
    shutil.copytree(data_dir, home / "data/books")
    shutil.copytree(data_dir, home / "runs/demo/data")
    small = smaller("train", ["--run.threads", "1"])
    for run, objective in {
        "books": "unrolled", "demo/denoise": "denoise", "demo/one_step": "one_step",
        "demo/unrolled": "unrolled", "demo/next_token": "next_token",
    }.items():  # fmt: skip
        options = ["--objective.name", objective, "--data.path", str(home / "data/books")]
        train(load_config(ROOT / "train/configs/tiny.toml", [*small, *options, "--run.dir", str(home / "runs" / run)]))
    return home


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run_in_order(
    page: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(template, home)
    for folder in ("recurrent_db", "train", "eval", "tokenizers", "benchmarks", "tests", "docs"):
        (home / folder).symlink_to(ROOT / folder)
    runner = Runner(home, monkeypatch)
    for block in blocks(page):
        if block.runs_here:
            runner.run(block)


# -- what documents name -----------------------------------------------------------------------------------------------

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = "deep_supervision"
"""The objective that docs/adding-an-objective.md adds."""
FOLDERS = ("recurrent_db", "train", "eval", "tokenizers", "benchmarks", "tests", "docs")
SUFFIXES = (".py", ".sh", ".sbatch", ".toml", ".md")
OTHERS = (".json", ".safetensors")
"""What a run leaves."""


def repository() -> set[str]:
    """Every file and folder of the repository, and every end of its path: a/b/c.py, b/c.py, c.py."""
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    ends = {"/".join(path.parts[start:]) for path in paths for start in range(len(path.parts))}
    return ends | {path.name for path in ROOT.iterdir()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    words = re.findall(r"(?<![\w/.-])[a-z_][\w./-]*[\w/]", text)
    words = [word for word in words if not re.search(r"[A-Z]{2}", word)]  # a/NAME.py is a placeholder
    named = {word for word in words if word.endswith(SUFFIXES) or (word.endswith("/") and word.startswith(FOLDERS))}
    known = repository()
    missing = {word for word in named if word.rstrip("/") not in known}
    missing = {word for word in missing if not word.startswith("benchmarks/results/")}  # what benchmarks write
    assert {word for word in missing if EXAMPLE not in word} == set()
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not link.startswith("http") and not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_option_that_a_document_names_is_there(document: Path) -> None:
    """Dotted keys of the configuration."""
    known = set(keys(Config))
    sections = {key.split(".")[0] for key in known if "." in key}
    options = re.findall(
        rf"(?:--|`)((?:{'|'.join(sections)})(?:\.[\w-]+)+)(?![\w(])", document.read_text(encoding="utf-8")
    )
    named = {option.replace("-", "_") for option in options if not option.endswith((*SUFFIXES, *OTHERS))}
    groups = {key.rpartition(".")[0] for key in known} | {"model.silent_state"}  # what the objective sets
    assert {name for name in named if name not in known | groups and EXAMPLE not in name} == set()
