"""What headers of torchao's files say, told without torchao, against its own words."""

import pytest

from compress.formats.base import DTYPES
from compress.formats.torchao_header import metadata
from compress.quant.grid import Grid
from compress.stages.quantize.matrix import Matrix

torchao = pytest.importorskip("compress.formats.torchao")
pytest.importorskip("torchao")


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, -1), (4, 32)])
@pytest.mark.parametrize("model", ["BF16", "F16", "F32"])
def test_it_is_what_torchao_says(bits: int, group_size: int, model: str) -> None:
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    matrices = [Matrix(name, (48, 64), bits, group_size, True, inputs="dynamic") for name in names]
    grids = {name: Grid(bits, group_size, True, DTYPES[model], signed_scale=False) for name in names}
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (64,), "lm_head.weight": (96, 64)}
    groups = matrices[0].groups
    for name in names:
        shapes |= {f"{name}._weight_qdata": (48, 64), f"{name}._weight_scale": (48, groups)}
    found = metadata(matrices, ["model.norm.weight", "lm_head.weight"], model)
    theirs = torchao.metadata(grids, shapes)
    assert {key: found[key] for key in found if key != "tensor_names"} == {
        key: theirs[key] for key in theirs if key != "tensor_names"
    }
    assert len(found["tensor_names"]) == len(theirs["tensor_names"])
