"""Runs interpreted_blocks.py: the kernels for ggml's blocks without a GPU. On one, test_block_kernels_gpu.py."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which exists for Linux alone")
def test_the_kernels_in_tritons_interpreter() -> None:
    here = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", "--noconftest"]  # its fixtures import more than a kernel needs
    command = [sys.executable, "-m", "pytest", *options, str(here / "interpreted_blocks.py")]
    found = subprocess.run(command, env=environment, cwd=here.parent.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
