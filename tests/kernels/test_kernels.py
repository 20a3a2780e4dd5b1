"""Runs interpreted_kernels.py: the Triton kernels without a GPU. On one, test_kernels_gpu.py has them as compiled."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from compress.kernels import usable


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which exists for Linux alone")
def test_kernels_in_tritons_interpreter() -> None:
    here = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", "--noconftest"]  # its fixtures import more than a kernel needs
    command = [sys.executable, "-m", "pytest", *options, str(here / "interpreted_kernels.py")]
    found = subprocess.run(command, env=environment, cwd=here.parent.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


def test_the_solver_on_a_cpu_never_imports_triton() -> None:
    assert not usable(torch.zeros(1))
    code = (
        "import sys, torch\n"
        "from compress.quant.gptq import factorize, gptq\n"
        "from compress.quant.grid import Grid\n"
        "factor = factorize(torch.eye(32), torch.arange(32), 0.01)\n"
        "before = 'triton' in sys.modules\n"
        "gptq(torch.ones(2, 32), factor, Grid(4, 32, True), 'hessian')\n"
        "sys.exit(not before and 'triton' in sys.modules or 'compress.kernels.solver' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
