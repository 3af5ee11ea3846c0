"""Reports on runs that were trained on images, alone and beside runs on text."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import save

from recurrent_db.accounting.flops import step_cost, total
from recurrent_db.config import load_config
from recurrent_db.data.vocabulary import ImageClasses
from recurrent_db.errors import UserError
from recurrent_db.model.image_networks import build_image_network
from recurrent_db.objectives import build_objective
from recurrent_db.report.comparison import Comparison
from recurrent_db.report.cost import training_cost
from recurrent_db.report.page import write_report
from recurrent_db.report.runs import read_run, read_runs
from recurrent_db.report.sections.images import images
from recurrent_db.report.sections.summary import summary
from recurrent_db.rng import Rng
from recurrent_db.schema import to_dict

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
CLASSES = ("cat", "dog & <b>hound</b>")
SCORE = {"accuracy": 0.75, "accuracy_stderr": 0.0125, "nll": 0.6543, "nll_stderr": 0.021}


def image_run(folder: Path, objective: str, n_blocks: int = 2, steps: int = 12) -> Path:
    """A run directory as the trainer leaves it, without weights."""
    words = [
        "--objective.name", objective, "--model.n-prelude", "0", "--model.n-coda", "0", "--model.n-core", "2",
        "--model.d-model", "16", "--model.n-heads", "2", "--model.d-mlp", "32", "--model.d-condition", "8",
        "--model.n-blocks", str(n_blocks), "--budget.steps", str(steps), "--data.path", "data/images",
    ]  # fmt: skip
    config = load_config(None, words)
    checkpoint = folder / "checkpoints/step-00000012"
    checkpoint.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (checkpoint / "images.json").write_bytes(ImageClasses(CLASSES, (8, 8), "ab" * 32).model_bytes)
    config.model.image_size, config.model.n_classes = [8, 8], 2
    cost = step_cost(config, build_objective(config).passes(Rng(0, 0), 0.0)).total
    rows: list[dict[str, Any]] = [
        {"step": n, "tokens": 80 * n, "flops": 80 * n * cost, "loss": 2 / n, "lr": 1e-3, "seconds": n / 2}
        for n in range(1, steps + 1)
    ]
    rows[-1] |= {"eval/accuracy_k1": 0.5, "eval/nll_k1": 0.875} if objective != "denoise_image" else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def classifier(folder: Path) -> Path:
    scores = {
        "1": SCORE | {"flops_per_image": 123456.0},
        "2": SCORE | {"accuracy": 0.8125, "flops_per_image": 234567.0},
    }
    save(image_run(folder, "denoise_class"), "images", {
        "split": "test", "images": 800, "draws": 8, "by_steps": scores, "by_block": {"2": SCORE | {"accuracy": 0.6875}},
    })  # fmt: skip
    return folder


def generator(folder: Path, extractor: str = "c0ffee" * 10) -> Path:
    distance = {
        "frechet": 1.2345,
        "kid": 0.00321,
        "kid_std": 0.0001,
        "samples": 5000,
        "real": 800,
        "extractor": extractor,
    }
    save(image_run(folder, "denoise_image"), "images", {
        "split": "test", "classes": CLASSES, "samples": 5000, "guidance": 2.0, "sampler": "euler", "sampler_steps": 50,
        "flops_per_image": 9.87e8, "distance": distance, "floor": distance | {"frechet": 0.0456, "kid": 0.0},
    })  # fmt: skip
    (folder / "eval/images.png").write_bytes(PNG)
    return folder


def report(tmp_path: Path, *runs: Path) -> str:
    write_report(list(runs), tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def section(html: str, key: str) -> str:
    return html.split(f'<section id="{key}"')[1].split("</section>")[0]


def own_section(*runs: Path) -> str:
    """The section on images, without the rest of the page."""
    return images(Comparison(read_runs(list(runs)), {}))


def sections(html: str) -> list[str]:
    return re.findall(r'<section id="([\w-]+)"', html)


def words(html: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", html).split())


def test_runs_of_images_alone(tmp_path: Path) -> None:
    html = report(tmp_path, classifier(tmp_path / "vit"), generator(tmp_path / "dit"))
    assert sections(html) == ["summary", "images", "loss", "flops", "memory", "blocks", "throughput", "provenance"]
    shown = words(section(html, "images"))
    assert "eval/images.json: test split, 800 images, 8 draws" in shown
    assert "steps: 1 0.7500 ± 0.0125 0.654 ± 0.021" in shown
    assert "steps: 2 0.8125" in shown
    assert "read-out of block 2 0.6875 ± 0.0125 0.654 ± 0.021 –" in shown
    assert "1.2345 0.0456 0.00321 ± 0.00010 0.00000 5000 800 test 2.0 50 euler 9.87 × 10⁸ c0ffeec0ffee" in shown
    assert "Warning" not in shown
    assert "FID" not in html
    [data] = re.findall(r'<img alt="Samples of dit" src="data:image/png;base64,([^"]*)"', html)
    assert b64decode(data) == PNG
    assert "Rows: cat, dog &amp; &lt;b&gt;hound&lt;/b&gt;." in html
    assert "own units" in section(html, "loss")
    assert "nats/token" not in section(html, "blocks")


def test_runs_of_text_and_of_images(tmp_path: Path, three_runs: list[Path], page: str) -> None:
    html = report(tmp_path, *three_runs, classifier(tmp_path / "vit"))
    assert "some runs are of text and some of images" in section(html, "summary")
    assert "different vocabularies" not in html
    assert sections(html)[:2] == ["summary", "images"]
    assert [key for key in sections(html) if key not in ("images", "blocks")] == sections(page)
    for key in ("depth", "state", "inference", "sigma", "flops-to-loss"):
        assert "vit" not in words(section(html, key)), key
    assert "<img" not in html


def test_parameters_and_flops_are_the_networks(tmp_path: Path) -> None:
    run = read_run(image_run(tmp_path / "vit", "classify", 0), "vit")
    parameters = run.parameters()
    assert parameters is not None
    assert parameters["total"] == sum(p.numel() for p in build_image_network(run.config, 0).parameters())
    last = run.rows[-1]
    assert total(training_cost(run)).total == pytest.approx(last["flops"] / last["tokens"])


def test_a_run_that_was_not_scored_shows_its_last_evaluation(tmp_path: Path) -> None:
    shown = words(
        own_section(image_run(tmp_path / "vit", "denoise_class"), image_run(tmp_path / "dit", "denoise_image"))
    )
    assert "the last evaluation during training" in shown
    assert "steps: 1 0.5000 0.875 –" in shown
    assert "Distances left out" in shown
    assert "Pictures left out" in shown


def test_distances_under_different_extractors(tmp_path: Path) -> None:
    runs = generator(tmp_path / "one"), generator(tmp_path / "two", "decaf" * 12)
    with pytest.raises(UserError, match=r"^one and two were scored under different extractors .*decafdecafde\)"):
        read_runs(runs)


@pytest.mark.parametrize("name", ["eval/images.json", "eval/images.png", "checkpoints/step-00000012/images.json"])
def test_damaged_files_leave_their_part_out(tmp_path: Path, name: str) -> None:
    run = generator(tmp_path / "dit")
    (run / name).write_bytes(b'{"classes": 7')
    shown = words(summary(Comparison(read_runs([run]), {})))
    assert Path(name).name in shown
    assert "left out" in shown
    assert ("<img" in own_section(run)) == (name != "eval/images.png")


@pytest.mark.parametrize("value", [None, 3, "x", [1], {"1": 2}, {"frechet": "<script>", "extractor": ["<script>"]}])
def test_odd_results_break_nothing(tmp_path: Path, value: object) -> None:
    runs = [image_run(tmp_path / "vit", "denoise_class"), image_run(tmp_path / "dit", "denoise_image")]
    for run in runs:
        names = (
            "by_steps",
            "by_block",
            "distance",
            "floor",
            "classes",
            "samples",
            "guidance",
            "split",
            "images",
            "draws",
        )
        save(run, "images", dict.fromkeys(names, value) | {"flops_per_image": np.pi})
    assert "<script" not in own_section(*runs)
