"""Records the types that llama.cpp's `llama_model_quantize` gives to each tensor, for tests/formats/test_ggml_mixes.py.

    python tests/support/record_mixes.py FOLDER

FOLDER holds a prebuilt libllama with the quantizer and the libggml of the same build; the npm package
@node-llama-cpp/linux-x64 (3.22.1 was used, llama.cpp 0.5.0) brings them in bins/linux-x64. Each case is a model of
random weights in widths that are small but of the right kind; what its file holds afterwards is written as JSON, one
line a case, as runs of layers with one type.
"""

import ctypes
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

RECORDED = Path(__file__).parent.parent / "formats" / "llama_mixes.jsonl"
NUMBERS = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25,
}  # fmt: skip
ROLES = {
    "token_embd": "embeddings", "output": "head", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
# layers, heads, heads of keys and values, tied, hidden size, intermediate size
MODELS = (
    (1, 2, 2, True, 256, 256), (6, 8, 4, True, 256, 768), (17, 8, 2, False, 256, 256), (32, 8, 1, False, 256, 256),
    (80, 8, 1, False, 256, 256), (80, 2, 2, False, 256, 256), (9, 3, 1, True, 96, 256), (9, 4, 1, False, 96, 160),
    (2, 2, 1, False, 256, 272), (2, 2, 1, False, 144, 256),
)  # fmt: skip


class Parameters(ctypes.Structure):
    _fields_ = [
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int), ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool), ("only_copy", ctypes.c_bool), ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool), ("dry_run", ctypes.c_bool), ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p), ("tt_overrides", ctypes.c_void_p), ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    ]  # fmt: skip


def libllama(folder: Path) -> ctypes.CDLL:
    for pattern in ("libggml-base.so*", "libggml.*so*"):
        ctypes.CDLL(str(next(folder.glob(pattern))), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(next(folder.glob("libllama.*so*"))))
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    return library


def write_model(path: Path, layers: int, heads: int, shared: int, tied: bool, hidden: int, inner: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(32)
    values = hidden // heads * shared
    shapes = {"token_embd": (32, hidden), "output_norm": (hidden,)} | ({} if tied else {"output": (32, hidden)})
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (values, hidden),
                "attn_v": (values, hidden), "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden),
                "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
            }.items()
        }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.random.default_rng(0).normal(0, 1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_types(file: Path) -> list[tuple[str, str]]:
    """Name and type of the matrices, layer by layer."""
    found = [
        (each.name.removesuffix(".weight"), each.tensor_type.name.lower()) for each in gguf.GGUFReader(file).tensors
    ]
    matrices = [each for each in found if "norm" not in each[0]]
    return sorted(matrices, key=lambda each: [int(number) for number in re.findall(r"blk\.(\d+)", each[0])])


def main(folder: str) -> None:
    library = libllama(Path(folder))
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "source.gguf", Path(scratch) / "made.gguf"
        for model, (mix, number) in itertools.product(MODELS, NUMBERS.items()):
            write_model(source, *model)
            parameters = library.llama_model_quantize_default_params()
            parameters.ftype, parameters.nthread = number, 1
            code = library.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(parameters))
            assert code == 0, (model, mix)
            types: dict[str, list[str]] = {}
            for name, kind in tensor_types(made):
                types.setdefault(ROLES[re.sub(r"blk\.\d+\.", "", name)], []).append(kind)
            short = {
                role: [[kind, len(list(run))] for kind, run in itertools.groupby(kinds)]
                for role, kinds in types.items()
            }
            lines.append(json.dumps({"mix": mix, "model": model, "types": short}))
            made.unlink()
    RECORDED.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
