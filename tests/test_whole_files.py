"""The hook of whole_files.py, in a pytest of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    "line", ["pytest.importorskip('no_such')", "pytest.skip('x', allow_module_level=True)"]
)
def test_a_file_that_skips_itself_is_an_error(line: str, tmp_path: Path) -> None:
    (tmp_path / "test_whole.py").write_text(f"import pytest\n{line}\ndef test_nothing(): pass\n")
    (tmp_path / "test_part.py").write_text("import pytest\ndef test_part(): pytest.skip('part')\n")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "whole_files", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert child.returncode == 2 and "1 error" in child.stdout, child.stdout
    assert "test_whole.py skips itself" in child.stdout and "1 skipped" not in child.stdout.split("error")[0]
