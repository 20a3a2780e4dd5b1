"""Bytes of safetensors files before they are written, against the files that the library and `merge_parts` write."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.model.checkpoint import merge_parts, write_part
from compress.model.layout import Planned, by_layer, merged_bytes

DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32,
    "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = st.text('ab.é"\\漢', min_size=1, max_size=6)
TENSORS = st.builds(Planned, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 40), max_size=3).map(tuple))


def made(info: Planned) -> Tensor:
    return torch.zeros(math.prod(info.shape)).to(DTYPES[info.dtype]).view(info.shape)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(NAMES, TENSORS, min_size=1, max_size=12), min_size=1, max_size=3), st.data())
def test_bytes_are_those_of_the_files(parts: list[dict[str, Planned]], data: st.DataObject) -> None:
    parts = [{f"{number}.{name}": info for name, info in part.items()} for number, part in enumerate(parts)]
    metadata = data.draw(st.dictionaries(NAMES, st.text(max_size=9), max_size=2))
    limit = data.draw(st.sampled_from([0, 10**9]))
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"part-{number}.safetensors" for number in range(len(parts))]
        for file, part in zip(files, parts, strict=True):
            tensors = {
                name: torch.zeros(math.prod(i.shape)).to(DTYPES[i.dtype]).view(i.shape) for name, i in part.items()
            }
            write_part(file, tensors, {})
        (folder / "out").mkdir()
        merge_parts(files, folder / "out", lambda _: metadata, limit)
        written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
    assert merged_bytes(parts, metadata, limit) == written


def test_parts_are_what_lies_outside_and_then_the_layers_in_their_order() -> None:
    info = Planned("BF16", (2,))
    names = ["model.layers.10.a", "lm_head.weight", "model.layers.9.b", "model.layers.9.a", "model.layers.norm.w"]
    parts = by_layer(dict.fromkeys(names, info), "model.layers")
    assert [sorted(part) for part in parts] == [
        ["lm_head.weight", "model.layers.norm.w"], ["model.layers.9.a", "model.layers.9.b"], ["model.layers.10.a"],
    ]  # fmt: skip
