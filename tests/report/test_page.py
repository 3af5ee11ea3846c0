"""The report page: what it holds and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_runs import OBJECTIVES, fake_config, fake_run, save
from helpers import browse

from recurrent_db.commands import report
from recurrent_db.errors import UserError
from recurrent_db.report.comparison import Comparison
from recurrent_db.report.page import POLICY, SECTIONS, write_report
from recurrent_db.report.runs import (
    read_run,
    read_runs,
)
from recurrent_db.report.sections.summary import summary
from recurrent_db.schema import to_dict

SCRIPT = "<script>alert(1)</script>"


class Elements(HTMLParser):
    """Tags with their attributes, ids, and tags that are left open."""

    VOID = frozenset({"meta", "link", "br", "img", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ---------------------------------------------------------------------------------------------------------------------
# The page


def check_page(html: str) -> None:
    """Well-formed, self-contained, with every section, unique ids and no dangling reference."""
    elements = Elements(html)
    assert elements.open == []
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in elements.tags:
        assert tag not in ("script", "img", "iframe", "object", "embed")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src"):
                assert value == "data:," or (value or "").removeprefix("#") in ids
            for target in re.findall(r"url\((.*?)\)", value or ""):
                assert target.removeprefix("#") in ids
    assert "http:" not in html and "https:" not in html and "@import" not in html
    sections = [key for key, _, _ in SECTIONS if key not in ("blocks", "images")]  # no run here has these
    assert sections == [a["id"] for tag, a in elements.tags if tag == "section"]


def test_page_is_self_contained_and_has_every_section(page: str) -> None:
    check_page(page)
    assert "Left out" not in page
    assert page.count("<figure") > 12


def test_twelve_runs(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / f"{OBJECTIVES[i % 3]}-{i}", OBJECTIVES[i % 3], steps=40, seed=i, share=0.6 if i == 5 else 1)
        for i in range(12)
    ]
    write_report(runs, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_page(html)
    assert all(run.name in html for run in runs)
    assert html.count("incomplete: 60% of the budget") == 1


def test_two_runs_without_optional_files(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, name, steps=40) for name in ("denoise", "next_token")]
    for run in runs:
        shutil.rmtree(run / "eval")
        (run / "environment.json").unlink()
    write_report(runs, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_page(html)
    for missing in ("denoiser_report.json", "lm_eval.json", "samples.json"):
        assert f"Left out: no run has eval/{missing}" in html
    assert "the last evaluation during training (step 40)" in html  # NLL by K falls back on it


def test_damaged_and_empty_files_leave_their_sections_out(tmp_path: Path) -> None:
    damaged = fake_run(tmp_path / "damaged", "denoise", steps=20)
    for name, content in {
        "depth_curve": '{"by_k": {"1": {"nll": "low"}, "x": {"nll": 1}, "2": 3}}',
        "samples": '[1, {"prompt": ["a"], "text": null}]',
        "lm_eval": '{"results": {"task": 3, "other": {"acc": NaN}}}',
        "denoiser_report": '{"nll_by_sigma": {"0.1": 1, "-1": 2, "a": 3, "1": null}}',
    }.items():
        (damaged / "eval" / f"{name}.json").write_text(content)
    (damaged / "environment.json").write_text("{")
    (damaged / "metrics.jsonl").write_text('7\n{"step": 21, "loss": 1' + "0" * 400 + '}\n{"step":')
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(damaged / "config.json", bare)
    write_report([damaged, bare], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_page(html)
    assert html.count("Left out: ") == 7
    assert "damaged: environment.json could not be read and is left out" in html
    assert "no metrics" in html
    assert read_run(damaged, "run").loss_by_sigma == [(0.1, 1.0)]


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "<b onclick=x>$run$", "denoise", steps=20)
    config = fake_config("denoise", 20)
    config.data.path = config.run.dir = SCRIPT + '" onload="alert(1)'
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    (run / "environment.json").write_text(
        json.dumps({"command": [SCRIPT], "git_commit": SCRIPT, "device_name": SCRIPT})
    )
    save(run, "samples", [{"prompt": SCRIPT, "k": SCRIPT, "text": f"{SCRIPT}</pre></section>\x00\ud800&amp;"}])
    save(run, "lm_eval", {"by_k": {SCRIPT: {SCRIPT: {SCRIPT: 0.5}}}})
    (tmp_path / "baselines.json").write_text(json.dumps({SCRIPT: 3.0}))
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_page(html)
    assert "<script" not in html and "<b " not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;/pre&gt;&lt;/section&gt;\ufffd\ufffd&amp;amp;" in html
    assert "$run$" in html  # and not mathematics


def test_axes_have_labels_with_units(page: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    texts = [set(re.findall(r"<text[^>]*>([^<]*)</text>", figure)) for figure in figures]
    for expected in (
        "training compute (FLOPs)", "training data (tokens)", "training time (seconds, without evaluation)",
        "K (core iterations at inference)", "inference compute (FLOPs/token, one draw)", "memory (MiB)",
        "iteration (core passes so far)", "RMS per component (own units)",
        "training compute (FLOPs/token)", "tokens per second", "share of peak FLOPs/s (%)", "K (core iterations)",
    ):  # fmt: skip
        assert any(expected in found for found in texts), expected
    for found in texts:
        labels = [label for label in found if "(" in label or label == "tokens per second"]
        assert len(labels) >= (1 if "denoise" in found else 2), found  # the bars' other axis names the runs


def test_colours_follow_the_theme(page: str) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", figures) == []
    used = set(re.findall(r"var\((--\w+)\)", page)) - {"--box"}
    light, dark = page.split("prefers-color-scheme: dark", 1)
    for name in used:
        assert f"{name}:" in light and f"{name}:" in dark.split("* {", 1)[0]


def test_summary_shows_the_numbers_of_the_files(page: str) -> None:
    summary = page[page.index('id="summary"') : page.index('id="loss"')]
    assert "<strong>2.080</strong>" in summary and "± 0.021" in summary
    assert summary.count("904 k") == 3 and "+ 215 k cond." in summary
    assert "bigram" in summary and "3.400" in summary and "corpus" not in summary
    assert "Warning:" not in summary
    assert "averages over noise levels" in page


def test_runs_that_do_not_compare_are_called_out(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, steps=20) for name in ("a", "b")]
    config = fake_config(steps=20)
    config.model.vocab_size = 1024
    (runs[1] / "config.json").write_text(json.dumps(to_dict(config)))
    save(runs[1], "depth_curve", {"by_k": {"1": {"nll": 3.0}}, "tokens": 100})
    loaded = read_runs(runs)
    html = summary(Comparison(loaded, {}))
    assert "different vocabularies: compare bits per byte" in html
    assert "scored on different amounts of held-out text" in html


def test_one_run_with_png_files_and_the_same_bytes_again(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "denoise", "denoise", steps=20)
    args = report.arguments(
        [str(run), "-o", str(tmp_path / "1.html"), "--png", str(tmp_path / "png")], "recurrent-db report"
    )
    assert report.run(args) == 0
    write_report([run], tmp_path / "2.html")
    html = (tmp_path / "1.html").read_text(encoding="utf-8")
    check_page(html)
    assert html == (tmp_path / "2.html").read_text(encoding="utf-8")
    files = sorted((tmp_path / "png").iterdir())
    assert len(files) == html.count("<figure") and all(f.read_bytes().startswith(b"\x89PNG") for f in files)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": {"wings": 2}}'])
def test_a_directory_that_is_no_run_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    for path in (folder, tmp_path / "missing"):
        with pytest.raises(UserError) as error:
            write_report([path], tmp_path / "report.html")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no run directory is given"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page_without_errors_or_requests(page: str, tmp_path: Path) -> None:
    document, console, fetched = browse(page, tmp_path / "page")
    assert document.count("<section") == len(SECTIONS) - 2
    assert not console and not fetched
    control = page.replace(POLICY, "").replace(
        "<main>", '<main><img src="http://127.0.0.1:9/x.png"><script>console.error("x")</script>'
    )
    assert browse(control, tmp_path / "control")[1:] == (True, True)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_the_page_is_no_wider_than_a_phone(page: str, tmp_path: Path) -> None:
    """Tables scroll in their own boxes; nothing else sticks out of 375 pixels."""
    measure = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    listen = "<script>onmessage = (event) => { document.body.dataset.width = event.data; }</script>"
    page = page.replace(POLICY, "")  # the measuring is done by a script
    for html, wide in ((page, False), (page.replace("<main>", '<main><pre style="width: 900px">x</pre>'), True)):
        (tmp_path / "inner.html").write_text(html.replace("</body>", measure), encoding="utf-8")
        frame = f'<iframe src="{(tmp_path / "inner.html").as_uri()}" style="width: 375px; border: 0"></iframe>'
        document, _, _ = browse(f"<body>{listen}{frame}</body>", tmp_path / f"outer-{wide}")
        width = re.search(r'data-width="(\d+)"', document)
        assert width is not None and (int(width[1]) > 375) == wide
