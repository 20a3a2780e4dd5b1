"""An importance matrix as a GGUF file, as llama.cpp's llama-imatrix writes one and its llama-quantize reads it.

For each matrix NAME inside the layers there are NAME.in_sum2, the sum over tokens of each input's square, and
NAME.counts, how many tokens these were; both float32. Left out: NAME.in_sum, which newer versions add for statistics of
their own and no quantizer reads; embeddings and head, which llama-imatrix leaves out too.
The format: https://github.com/ggml-org/llama.cpp/blob/master/tools/imatrix/imatrix.cpp (`save_imatrix`).
"""

import os
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, get_tensor_name_map

from compress.exports.gguf.config import header_of
from compress.model.checkpoint import Checkpoint, read_part
from compress.system.files import beside, writing


def export_imatrix(folder: Path, sums: Path, file: Path) -> None:
    """Write the importance matrix of a model.

    Args:
        folder: the model's checkpoint, whose config says what llama.cpp calls its tensors.
        sums: safetensors file of the sums, [I] by the linear's name in the checkpoint; its metadata has the `text`,
            the number of its `sequences` and their `length`.
        file: to write, in place of what has the name.

    Raises:
        OutputError: it can't be written.
    """
    header = header_of(folder, str(Checkpoint(folder).config.get("model_type")))
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == header.target.architecture)
    names = get_tensor_name_map(architecture, header.config.num_hidden_layers)
    tensors, about = read_part(sums)
    length, sequences = int(about["length"]), int(about["sequences"])
    with writing(file.parent), beside(file) as scratch:
        writer = GGUFWriter(scratch / file.name, "")
        try:
            writer.add_type(GGUFType.IMATRIX)
            writer.add_array(Keys.IMatrix.DATASETS, [about["text"]])
            writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, sequences)
            writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, length)
            for name, module in sorted((names.get_name(module) or "", module) for module in tensors):
                assert name, "the model's own file has a place for each"
                writer.add_tensor(f"{name}.weight.in_sum2", tensors[module].numpy())
                writer.add_tensor(f"{name}.weight.counts", np.array([sequences * length], np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            for opened in writer.fout or []:
                opened.flush()
                os.fsync(opened.fileno())
        finally:
            writer.close()
        (scratch / file.name).replace(file)
