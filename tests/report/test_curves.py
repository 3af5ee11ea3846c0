"""Smoothing of curves."""

from __future__ import annotations

import numpy as np
import pytest

from recurrent_db.report.curves import smooth


def test_smoothing_keeps_a_constant_and_corrects_for_its_start() -> None:
    assert smooth(np.full(1000, 3.0)) == pytest.approx(3.0)
    steps = smooth(np.array([0.0, 1.0]), share=1.5)  # span 3, decay 1/2: (0/4 + 1/2) / (3/4)
    assert steps[1] == pytest.approx(2 / 3)
