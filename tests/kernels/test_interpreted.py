"""Runs interpreted_*.py: kernels without a GPU, in Triton's interpreter. On a GPU, *_gpu.py has them as compiled."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which exists for Linux alone")
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("interpreted_*.py")))
def test_kernels_in_tritons_interpreter(file: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", "--noconftest"]  # its fixtures import more than a kernel needs
    command = [sys.executable, "-m", "pytest", *options, str(HERE / file)]
    found = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
