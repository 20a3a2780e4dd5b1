"""What only a GPU can show: the CUDA paths beside their CPU twins, which the other files test."""

from pathlib import Path

import pytest
import torch

from compress.quant.gptq import factorize, gptq, visiting_order
from compress.quant.grid import Grid
from compress.quant.statistics import gram

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_on_the_gpu_is_exact_to_float32(dtype: torch.dtype) -> None:
    batches = [torch.randn(2, 500, 300, device="cuda").to(dtype) for _ in range(3)]
    rows = torch.cat(batches).view(-1, 300).double()
    expected = rows.t() @ rows
    found = gram(batches)
    assert found is not None
    assert (found.double() - expected).norm() / expected.norm() < (1e-6 if dtype != torch.float32 else 1e-5)
    assert torch.equal(found, found.t())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_on_the_gpu_are_those_of_the_cpu(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator)
    mixed = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    grid = Grid(4, 64, symmetric)
    codes = []
    for device in ("cpu", "cuda"):
        hessian = (mixed.double().t() @ mixed.double()).float().to(device)
        factor = factorize(hessian, visiting_order(hessian.diagonal(), 64, True), 0.01)
        codes.append(gptq(weight.to(device), factor, grid, "hessian")[0].codes.cpu())
    assert (codes[0] != codes[1]).float().mean() < 0.01  # sums in another order move a few ties


def test_a_run_on_the_gpu_ends_verified(tiny_model: Path, tmp_path: Path) -> None:
    from compress.recipe.schema import Recipe
    from compress.runs.runner import run
    from compress.system.progress import Reporter

    recipe = Recipe.model_validate(
        {
            "name": "gpu",
            "model": str(tiny_model),
            "calibration": "general_en_small",
            "stages": [{"kind": "quantize", "group_size": 64}],
            "evaluate": {"sequence_length": 512, "windows": 8},
            "output": str(tmp_path / "out"),
        }
    )
    report = run(recipe, device="cuda", reporter=Reporter(quiet=True))
    assert report.verified is not None and report.verified.passed
    assert report.quality is not None and report.quality.kl.mean < 0.3
    assert report.stages[0].peak_gpu_memory_bytes
