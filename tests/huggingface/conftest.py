"""transformers must not write to the user's home."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies a folder's code before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("transformers"):
            folder = str(tmp_path_factory.mktemp("modules"))
            patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield
