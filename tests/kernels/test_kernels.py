"""When the Triton kernels are used; what they compute: test_interpreted.py, and on a GPU test_kernels_gpu.py."""

import subprocess
import sys

import torch

from compress.kernels import usable


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
