"""Packages that a command has no use for are not imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from planner.common.light import HEAVY, UNRUN, without

MODULE = "a_module_of_this_test"


def test_a_hidden_package_is_not_installed_until_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{MODULE}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with without((MODULE,)):
        assert importlib.util.find_spec(MODULE) is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(MODULE)
    assert importlib.util.find_spec(MODULE) is not None
    found = importlib.import_module(MODULE)
    with without((MODULE,)):
        assert importlib.import_module(MODULE) is found
    assert sys.modules.pop(MODULE) is found


@pytest.mark.slow
def test_verify_imports_no_package_that_it_has_no_use_for(quantized_mixtral: Path) -> None:
    code = (
        "import sys; from planner.cli import app\n"
        f"app(['verify', {str(quantized_mixtral)!r}], standalone_mode=False)\n"
        "assert 'transformers.modeling_utils' in sys.modules\n"
        f"print([name for name in {(*HEAVY, *UNRUN)!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
