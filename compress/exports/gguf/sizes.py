"""The files of a planned result and their bytes, to the byte: the same header is laid out, and no tensor is read."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGMLQuantizationType, GGUFWriter

from compress.exports.gguf.config import header_of
from compress.exports.gguf.tensors import Tensors
from compress.exports.gguf.tokenizer import tokenizer_keys
from compress.exports.gguf.write import keys_of, lay_out, own_type, write_headers
from compress.exports.plan import Foreseen
from compress.formats.ggml_mixes import MIXES
from compress.model.shapes import PlannedShapes


@dataclass(frozen=True)
class _Unread(PlannedShapes):
    """What `Tensors` takes for an open checkpoint, which is dense and whose numbers nobody asks for."""

    def load(self, names: Iterable[str], device: object = "cpu") -> dict[str, Any]:
        assert not list(names)
        return {}


def planned_sizes(
    config_folder: Path, result: Foreseen, mix: str, file_name: str, split: int | None, name: str
) -> dict[str, int]:
    """The bytes of each file that a quantize stage's result is written to, by name.

    Args:
        config_folder: with the config.json that the result will have, dense, and its tokenizer.
        result: what is planned; its matrices have a block type each.
        mix: of the stage.
        file_name: of the file, where there is one alone.
        split: most bytes of tensors in a file; None: there is one.
        name: what programs call the model.

    Raises:
        ModelError: what llama.cpp can't have, by name.
    """
    shapes = result.shapes
    header = header_of(config_folder, str(shapes.config.get("model_type")))
    words = tokenizer_keys(config_folder, header.config.vocab_size, name=name)
    config = {key: value for key, value in shapes.config.items() if key != "quantization_config"}
    unread: Any = _Unread(shapes, config, shapes.tensors, shapes.bytes)
    blocks = {f"{matrix.name}.weight": str(matrix.block).upper() for matrix in result.matrices}
    entries = [
        replace(entry, type=GGMLQuantizationType[blocks[entry.source]]) if entry.source in blocks else entry
        for entry in Tensors(unread, header, own_type(shapes), False).entries
    ]
    with TemporaryDirectory(prefix="dscompress-") as scratch:
        file = Path(scratch) / file_name
        writer = GGUFWriter(file, header.target.architecture, split_max_size=split or 0)
        try:
            lay_out(writer, keys_of(config_folder, header, words, MIXES[mix].number), entries)
            write_headers(writer)
            heads = [opened.tell() for opened in writer.fout or []]
        finally:
            writer.close()
        parts = [
            [head, *(info.nbytes for info in infos.values())] for head, infos in zip(heads, writer.tensors, strict=True)
        ]
        alignment = writer.data_alignment
        sizes = [sum(writer.ggml_pad(taken, alignment) for taken in part) for part in parts]
        return {each.name: taken for each, taken in zip(writer.format_shard_names(file), sizes, strict=True)}
