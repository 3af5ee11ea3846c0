"""Twenty steps of each objective reproduce the committed curves.

Tolerance: 2e-4 relative. Runs on one machine agree to the bit; between CPUs the order of additions in matrix products
differs, which twenty steps amplify to about 1e-5.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from helpers import OBJECTIVES

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import make_golden
from make_golden import NAMES, STEPS, curve

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("objective", NAMES)
def test_golden_curve(objective: str, tmp_path: Path) -> None:
    if objective in ("classify", "denoise_class"):
        pytest.importorskip("transformers", reason="transformers is not importable")
    golden = json.loads((Path(__file__).parents[1] / "golden" / f"{objective}.json").read_text())
    ours = curve(objective, tmp_path)
    assert ours.keys() == golden.keys()
    for name in ours:
        assert len(ours[name]) == STEPS
        for step, (a, b) in enumerate(zip(ours[name], golden[name], strict=True), start=1):
            assert (a is None) == (b is None), f"{name} at step {step}"
            if a is not None:
                assert math.isclose(a, b, rel_tol=2e-4), f"{name} at step {step}: {a} against {b}"
    if objective in OBJECTIVES:
        assert golden["loss"][-1] < golden["loss"][0] - 0.3


def test_a_recorded_curve_is_rewritten_on_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_golden, "curve", lambda name, scratch: {"loss": [1.0]})
    first, second = NAMES[:2]

    def written(*words: str) -> set[str]:
        for path in tmp_path.glob("*.json"):
            path.write_text("recorded")
        make_golden.main(list(words), tmp_path)
        return {path.stem for path in tmp_path.glob("*.json") if path.read_text() != "recorded"}

    assert written() == set(NAMES)
    (tmp_path / f"{first}.json").unlink()
    assert written() == {first}
    assert written() == set()
    assert written(second) == {second}
    assert written("--all") == set(NAMES)
    with pytest.raises(SystemExit):
        written("unknown")
