"""What must not happen: a stranger's file is executed, leads elsewhere, or speaks in a page; a secret is written down."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import many
import pytest
import torch
from fake_runs import fake_config, fake_run, save
from helpers import MICRO, ROOT, browse, make_checkpoint, synthetic_data

from recurrent_db import load
from recurrent_db.accounting.hardware import environment, hide_secrets
from recurrent_db.data import open_data
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.files import check_links, file_digest, read_json, sealed
from recurrent_db.report.page import POLICY, write_report
from recurrent_db.schema import to_dict
from recurrent_db.store.folder import find_checkpoint

SOURCES = sorted(
    path
    for folder in ("recurrent_db", "train", "eval", "tokenizers", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)

# ---------------------------------------------------------------------------------------------------------------------
# Nothing is executed

MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "tarfile",
    "zipfile",
}
"""Readers that run what they read, and archives, whose names lead anywhere."""
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "np.load", "numpy.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "shutil.unpack_archive", "pd.read_pickle",
    "pandas.read_pickle", "ast.literal_eval",
}  # fmt: skip


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangers(source: str) -> Iterator[str]:
    """What of a source could execute data: line and words."""
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or ""] if (node.module or "").split(".")[0] in MODULES else []
            found += [f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in CALLS]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            found = [name] if name in CALLS or name in BUILTINS else []
            for keyword in node.keywords:
                constant = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not constant:
                    found.append(f"{name}({keyword.arg}=...)")
        elif isinstance(node, ast.Subscript | ast.Attribute) and dotted(node) in {f"builtins.{b}" for b in BUILTINS}:
            found = [dotted(node)]
        for words in found:
            yield f"{getattr(node, 'lineno', 0)}: {words}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_execute_data(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "import joblib.numpy_pickle", "torch.load(x)", "from torch import load",
        "np.load(x, allow_pickle=True)", "eval(x)", "exec(x)", "compile(x, '', 'exec')", "__import__(x)", "yaml.load(x)",
        "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "os.system(x)",
        "f(trust_remote_code=given)", "builtins.eval", "import tarfile", "shutil.unpack_archive(x)",
    ],
)  # fmt: skip
def test_the_walk_finds_what_it_looks_for(source: str) -> None:
    assert list(dangers(source))
    assert not list(
        dangers("model.eval(); f(trust_remote_code=False); re.compile('x'); np.save('x', y, allow_pickle=False)")
    )


def test_pickles_beside_a_checkpoint_are_not_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Weights that run a command when unpickled, under every name that others read: the run loads, the command never ran."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    run = make_checkpoint(tmp_path / "run", tokenizer, "next_token", 32)
    folder = find_checkpoint(run)
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin", "model.pkl"):
        torch.save(Bomb(), folder / name)
    load(run, "cpu")
    shutil.copy(folder / "model.pt", folder / "model.safetensors")
    entry = {"bytes": (folder / "model.pt").stat().st_size, "sha256": file_digest(folder / "model.pt")}
    manifest = read_json(folder / "manifest.json")
    manifest["files"]["model.safetensors"] = entry
    del manifest["digest"]
    (folder / "manifest.json").write_text(sealed(manifest))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load(run, "cpu")
    assert not (tmp_path / "exploded").exists()
    torch.load(folder / "model.pt", weights_only=False)  # the control
    assert (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Nothing leads elsewhere


def test_links_out_of_a_run_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run = make_checkpoint(tmp_path / "run", tokenizer, "next_token", 32)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (run / "latest").symlink_to("checkpoints")  # inside: allowed
    (run / "wandb").mkdir()
    (run / "wandb" / "logs").symlink_to(tmp_path)  # no command follows it
    load(run, "cpu")
    for name, target in (("metrics.jsonl", secret), ("eval", tmp_path), ("checkpoints/step-00000009", tmp_path),
                         ("x", "/nowhere/at/all"), ("y", "y")):  # fmt: skip
        link = run / name
        link.symlink_to(target)
        for action in (
            lambda: load(run, "cpu"),
            lambda: check_links(run),
            lambda: write_report([run], tmp_path / "r.html"),
        ):
            with pytest.raises(UserError, match=f"{re.escape(str(link))} is a link that leads out of"):
                action()
        link.unlink()
    load(run, "cpu")
    folder = find_checkpoint(run)
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")  # the right content, from outside
    for path in (run, folder):
        with pytest.raises(UserError, match=r"leads out of|not a plain file"):
            load(path, "cpu")


def test_a_resumed_run_writes_through_no_link(tmp_path: Path, script_here: object) -> None:
    data = synthetic_data(tmp_path / "data", tokens=3000)
    options = ["train/pretrain.py", *MICRO, "--data.path", data, "--run.dir", tmp_path / "run", "--budget.steps", 2]
    assert script_here(*options).returncode == 0  # type: ignore[operator]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "victim")
    result = script_here(*options, "--resume")  # type: ignore[operator]
    assert result.returncode == 2 and "is a link that leads out of" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("key", ["file", "offsets_file", "tokenizer"])
@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "link", "inner/../../outside", "."])
def test_names_in_a_manifest_stay_inside(key: str, name: str, tmp_path: Path) -> None:
    from recurrent_db.data import load_tokenizer

    data = synthetic_data(tmp_path / "data", tokens=2000)
    (tmp_path / "outside").write_bytes(b"secret")
    (data / "link").symlink_to(tmp_path / "outside")
    manifest = read_json(data / "manifest.json")
    if key == "tokenizer":
        manifest["tokenizer"]["file"] = name
    else:
        manifest["splits"]["train"]["default"]["shards"][0][key] = name
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        load_tokenizer(data) if key == "tokenizer" else open_data(data, "train")
    assert "secret" not in str(caught.value)
    if name != ".":
        assert "outside the data directory" in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ""])
def test_names_in_a_checkpoint_are_plain(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    run = make_checkpoint(tmp_path / "run", tokenizer, "next_token", 32)
    path = find_checkpoint(run) / "manifest.json"
    manifest = read_json(path)
    manifest["files"][name] = {"bytes": 0, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not a plain file name"):
        load(run, "cpu")


def test_large_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recurrent_db.files.MOST_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('"12345678"')
    assert read_json(tmp_path / "a.json") == "12345678"
    (tmp_path / "a.json").write_text('"123456789"')
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "a.json")


# ---------------------------------------------------------------------------------------------------------------------
# Nothing speaks in a page

ATTACKS = (
    "<script>document.documentElement.dataset.owned = 1</script>",
    "<img src=x onerror='document.documentElement.dataset.owned = 1'>",
    '</pre></section></style><svg onload="document.documentElement.dataset.owned = 1"></svg>',
    '" onmouseover="x" autofocus onfocus="document.documentElement.dataset.owned = 1" x="',
    "]]><script>document.documentElement.dataset.owned = 1</script>",
    "--><script>document.documentElement.dataset.owned = 1</script>",
    "<iframe srcdoc='<script>parent.document.documentElement.dataset.owned = 1</script>'></iframe>",
    "javascript:document.documentElement.dataset.owned=1",
    "<style>@import 'http://127.0.0.1:9/x.css';</style><link rel=stylesheet href=http://127.0.0.1:9/x>",
    "\ud83d<scr\x00ipt>document.documentElement.dataset.owned = 1</scr\x00ipt>",
)


def hostile_run(folder: Path, attack: str) -> Path:
    """A run with an attack wherever a corpus, a sample, a task or a machine can put words."""
    run = fake_run(folder, "one_step", steps=20)
    config = fake_config("one_step", 20)
    config.data.path = config.data.val_path = config.run.dir = attack
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    words = {"command": [attack], "git_commit": attack, "device_name": attack, "python": attack, "platform": attack}
    (run / "environment.json").write_text(json.dumps({**words, "packages": {attack: attack}, "peak_note": attack}))
    save(run, "samples", [{"prompt": attack, "k": attack, "text": attack, attack: attack}])
    save(run, "lm_eval", {"by_k": {"1": {attack: {f"{attack},none": 0.5, "alias": attack}}}})
    (folder.parent / "baselines.json").write_text(json.dumps({attack: 3.0}))
    return run


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium on this machine: test_report reads the markup"
)
def test_no_words_of_a_run_become_script_in_a_browser(tmp_path: Path) -> None:
    runs = [hostile_run(tmp_path / f"{n}" / "run", attack) for n, attack in enumerate(ATTACKS)]
    write_report(runs, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    # The policy would stop a script, and so hide that words had become one: the words alone must not.
    document, console, fetched = browse(html.replace(POLICY, ""), tmp_path / "bare")
    assert "owned" in document and "data-owned" not in document and not console and not fetched
    assert browse(html, tmp_path / "whole")[1:] == (False, False)
    # The control: the same words as markup do run, and do not under the policy.
    control = html.replace("<main>", "<main>" + ATTACKS[0] + ATTACKS[1])
    assert 'data-owned="1"' in browse(control.replace(POLICY, ""), tmp_path / "control")[0]
    assert "data-owned" not in browse(control, tmp_path / "stopped")[0]


# ---------------------------------------------------------------------------------------------------------------------
# No secret is written down

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_QmFkQmFkQmFkQmFkQmFk",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLE",
    "DATABASE_PASSWORD": "correct horse battery",
    "SOME_VARIABLE": "an-ordinary-variable-of-the-environment",
}


def test_no_secret_of_the_environment_is_in_what_a_run_leaves(tmp_path: Path) -> None:
    """Weights & Biases included, where it is installed, and what the trainer prints; and even an argument that holds one."""
    data = synthetic_data(tmp_path / "data", tokens=3000)
    options = [*MICRO, "--data.path", str(data), "--run.dir", str(tmp_path / "run"), "--budget.steps", "3"]
    if shutil.which("wandb") or (Path(sys.executable).parent / "wandb").exists():
        options += ["--run.wandb", "offline"]
    job = many.start(tmp_path / "log", many.train, options, **SECRETS, WANDB_SILENT="true")
    assert job.wait(300) == [0], job.text()
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.json", "environment.json", "metrics.jsonl", "model.safetensors"} <= {path.name for path in left}
    if "offline" in options:
        assert any(path.suffix == ".wandb" for path in left)
    for content in (job.text().encode(), *(path.read_bytes() for path in left)):
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, name


def test_secrets_in_a_command_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        sys, "argv", ["pretrain.py", "--x", f"https://user:{SECRETS['HF_TOKEN']}@host", SECRETS["SOME_VARIABLE"]]
    )
    command = environment(torch.device("cpu"))["command"]
    assert command == ["pretrain.py", "--x", "https://user:(HF_TOKEN)@host", SECRETS["SOME_VARIABLE"]]
    assert hide_secrets("CommError: " + SECRETS["WANDB_API_KEY"]) == "CommError: (WANDB_API_KEY)"
    monkeypatch.setenv("EMPTY_KEY", "")
    assert hide_secrets("a b") == "a b"


# ---------------------------------------------------------------------------------------------------------------------
# Dependencies


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(word for extra in project["optional-dependencies"].values() for word in extra)]


def test_every_dependency_has_a_lowest_version_and_an_upper_bound() -> None:
    for requirement in requirements():
        assert requirement.startswith("recurrent-db[") or re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), (
            requirement
        )


def test_the_lock_names_what_the_project_needs() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values())  # no local build, no range
    for requirement in requirements():
        match = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", requirement)
        if match is None or match[1] in ("flash-attn", "nvidia-ml-py", "atheris"):  # not what CI installs
            continue
        found = pins[match[1].replace("_", "-").lower()]
        version, low, high = (
            tuple(int(n) for n in re.findall(r"\d+", word)[:3]) for word in (found, match[2], match[3])
        )
        assert low <= version < high, requirement
