"""Makes a folder for OpenVINO of a dense checkpoint, and puts codes into it: a script for an environment with both.

    python builder.py REQUEST.json

It is run by its path and imports nothing of dscompress, which that environment need not have. optimum-intel traces the
model; each matrix that has codes is then replaced by their constants, and the dense one is gone when the file is
written. `compress/exports/openvino/build.py` writes the request: `checkpoint` and `output` (folders), `dtype` ("fp32",
or null for the checkpoint's own), `options` (of the runtime, which the file keeps), `codes` (a safetensors file),
`modules` (a row for each matrix with codes: its `module`, the module whose tensors it has as `codes`, and what
`compress.exports.openvino.codes.shape_of` says).

Left out: rounding by NNCF, and 8-bit weights, which optimum-intel makes of models above 1B where nothing is said.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

MODEL, TOKENIZER, DETOKENIZER = "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"


def build(request: dict[str, Any]) -> None:
    """Write the folder.

    Raises:
        Exception: whatever optimum-intel and OpenVINO raise.
    """
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from optimum.intel.openvino.configuration import OVConfig
    from transformers import AutoTokenizer

    checkpoint, output = request["checkpoint"], Path(request["output"])
    dense = output.with_name("dense")
    main_export(
        checkpoint, output=dense, task="text-generation-with-past", library_name="transformers", local_files_only=True,
        ov_config=OVConfig(dtype=request["dtype"]),
    )  # fmt: skip
    output.mkdir()
    for file in dense.iterdir():
        if file.stem != Path(MODEL).stem:
            file.replace(output / file.name)
    model = openvino.Core().read_model(dense / MODEL)
    put_codes(model, request)
    for name, value in request["options"].items():
        model.set_rt_info(value, ["runtime_options", name])
    openvino.save_model(model, output / MODEL, compress_to_fp16=False)
    both = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint), with_detokenizer=True)
    for each, name in zip(both, (TOKENIZER, DETOKENIZER), strict=True):
        openvino.save_model(each, output / name, compress_to_fp16=False)


def put_codes(model: Any, request: dict[str, Any]) -> None:
    """Let the products and look-ups of each module read its codes."""
    if not request["modules"]:
        return
    from safetensors.numpy import load_file

    tensors = load_file(request["codes"])
    readers = {
        module_of(node): node for node in model.get_ordered_ops() if node.get_type_name() in ("MatMul", "Gather")
    }
    constants: dict[str, dict[str, Any]] = {}
    for row in request["modules"]:
        node = readers.get(row["module"])
        if node is None:
            raise ValueError(f"optimum-intel's graph has no matrix {row['module']}")
        if row["codes"] not in constants:
            constants[row["codes"]] = constants_of(row, tensors)
        place = 1 if node.get_type_name() == "MatMul" else 0
        shape = list(node.input(place).get_partial_shape().to_shape())
        if shape != [row["rows"], row["columns"]] or (place and not node.get_attributes().get("transpose_b")):
            raise ValueError(f"optimum-intel's graph has {row['module']} as {shape}, or turned")
        node.input(place).replace_source_output(weight_of(row, constants[row["codes"]]).output(0))


def module_of(node: Any) -> str:
    """The module of a node: `__module.model.layers.0.mlp.up_proj/aten::linear/MatMul` is model.layers.0.mlp.up_proj."""
    name: str = node.get_friendly_name()
    return name.removeprefix("__module.").split("/")[0] if "/" in name else ""


def constants_of(row: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Codes, scales and zero points of a matrix."""
    import numpy
    import openvino

    opset, kind = openvino.opset13, getattr(openvino.Type, f"{'i' if row['signed'] else 'u'}{row['bits']}")
    rows, groups, width = row["rows"], row["groups"], row["columns"] // row["groups"]

    def constant(part: str, *shape: int) -> Any:
        values = tensors[f"{row['codes']}.{part}"]
        if part == "scales":
            return opset.constant(values.reshape(shape), shared_memory=False)
        if kind == openvino.Type.i8:
            values = values.view(numpy.int8)
        return opset.constant(openvino.Tensor(values, openvino.Shape(shape), kind), shared_memory=False)

    wide, single = ((rows, groups, width), (rows, groups, 1)) if groups > 1 else ((rows, width), (rows, 1))
    found = {"codes": constant("codes", *wide), "scales": constant("scales", *single)}
    return found if row["signed"] else found | {"zeros": constant("zeros", *single)}


def weight_of(row: dict[str, Any], constants: dict[str, Any]) -> Any:
    """The matrix float32 [O, I] that they mean."""
    import numpy
    import openvino

    opset, kind = openvino.opset13, constants["scales"].get_element_type()
    weight = opset.convert(constants["codes"], kind)
    if "zeros" in constants:
        weight = opset.subtract(weight, opset.convert(constants["zeros"], kind))
    weight = opset.multiply(weight, constants["scales"])
    if row["groups"] > 1:
        weight = opset.reshape(weight, numpy.array([row["rows"], row["columns"]]), False)
    return weight if kind == openvino.Type.f32 else opset.convert(weight, openvino.Type.f32)


def main() -> None:
    """Read the request, write the folder; what went wrong is the last line."""
    try:
        build(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except Exception as error:  # of optimum-intel and OpenVINO, which raise all kinds
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
