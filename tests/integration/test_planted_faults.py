"""The planted faults: each changes one place of the package, to code that Python reads."""

from __future__ import annotations

import ast

import pytest
from helpers import ROOT, load_script

from recurrent_db.errors import UserError

planted_faults = load_script("benchmarks/reliability/planted_faults.py")


@pytest.mark.parametrize("fault", planted_faults.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_planted_in_one_place(fault: planted_faults.Fault) -> None:
    text = (ROOT / "recurrent_db" / fault.file).read_text(encoding="utf-8")
    changed = fault.plant(text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    with pytest.raises(UserError, match="has 0 lines"):
        fault.plant(text.replace(fault.before, ""))


def test_the_tests_of_the_changed_folder_come_first() -> None:
    [fault] = [fault for fault in planted_faults.FAULTS if fault.file == "rng.py"]
    files = planted_faults.fast_tests(ROOT)
    assert f"{ROOT}/tests/model/test_looped.py" in files
    assert f"{ROOT}/tests/integration/test_planted_faults.py" not in files
    assert planted_faults.fast_tests(ROOT, fault) == files
    [fault] = [fault for fault in planted_faults.FAULTS if fault.file == "store/checkpoint.py"][:1]
    assert "/store/" in planted_faults.fast_tests(ROOT, fault)[0]
