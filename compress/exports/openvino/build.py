"""A checkpoint as a folder for OpenVINO, which OVModelForCausalLM and LLMPipeline open.

optimum-intel traces the model in a process of its own (`builder.py`), with weights in the checkpoint's own dtype, which
OpenVINO's files hold unrounded. Codes are put in the place of the matrices that they mean. OpenVINO would also round
the inputs of these linears to 8 bits as it runs, where the processor is faster at that; the file says not to.

Left out: NNCF, which would round anew, and tracing without weights in memory: optimum-intel loads the whole model.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import __version__
from compress.errors import DscompressError, ModelError, OutputError
from compress.exports.marked import MARK, check_replaceable, folder_facts
from compress.exports.openvino import builder
from compress.exports.openvino.codes import WIDTHS, Digests, carried_grids, laid_out, shape_of
from compress.exports.openvino.config import traced_config
from compress.exports.refused import ROUNDS_INPUTS
from compress.formats.base import DTYPES
from compress.formats.dequantized import DequantizedCheckpoint
from compress.model.arch import FAMILIES
from compress.model.checkpoint import INDEX, Checkpoint, write_part
from compress.model.layout import by_layer
from compress.model.names import layers_prefix, says_tied
from compress.model.side_files import copy_side_files
from compress.quant.grid import Quantized
from compress.system.files import beside, commit, link_or_copy, make_writable, writing
from compress.system.programs import Engine, how_it_ended, run_program
from compress.system.progress import Reporter

CODE_VERSION = 1  # raised when the same checkpoint gives other files
MODEL = "openvino_model"
_RUN = 'import openvino_genai as og; print(og.LLMPipeline({}, "CPU").generate("Once upon a time", max_new_tokens=32))'
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}  # what lies in the current folder is no library
_CODES = "codes.safetensors"
_UNROUNDED = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # inputs of linears stay as they are


@dataclass(frozen=True)
class Written:
    """A model in a folder for OpenVINO.

    Args:
        folder: the folder.
        bytes: of all its files.
        weights: bytes of the graph and its data.
        codes: what the file must hold of the checkpoint's codes.
        remarks: what its user should hear, a line each.
    """

    folder: Path
    bytes: int
    weights: int
    codes: Digests
    remarks: list[str] = field(default_factory=list)

    @property
    def carried(self) -> int:
        """Matrices whose codes are the checkpoint's."""
        return len(self.codes)

    def facts(self) -> list[tuple[str, str]]:
        """What was written, a word and what it says, for people."""
        return folder_facts(self.folder, self.bytes, self.weights, f"{MODEL}.xml", self.carried, _RUN)


def export_openvino(
    folder: Path,
    output: Path,
    engine: Engine,
    kind: str = "auto",
    int8_inputs: bool = False,
    reporter: Reporter | None = None,
) -> Written:
    """Write a checkpoint as a folder that OpenVINO opens.

    Args:
        folder: the checkpoint, dense or quantized.
        output: the folder to write; it appears whole or not at all.
        engine: the environment that makes it.
        kind: "auto" keeps the codes of a quantized checkpoint and the dtype of other weights, "f32" writes all of them
            as float32.
        int8_inputs: let OpenVINO round the inputs of quantized linears to 8 bits as it runs, where it is faster.
        reporter: told what happens.

    Raises:
        ModelError: what can't be made, by name.
        OutputError: a folder of another program has the name, or the disk is full.
        DscompressError: optimum-intel or OpenVINO failed, in its own words.
    """
    reporter = reporter or Reporter()
    source = _Source(Checkpoint(folder), kind, int8_inputs)
    check_replaceable(output)
    make_writable(output.parent)
    with writing(output.parent), beside(output) as scratch:
        made, said, request = scratch / "made", scratch / "said.txt", scratch / "request.json"
        source.write(scratch / "read", reporter)
        asked = source.request(scratch / "read") | {"output": str(made)}
        request.write_text(json.dumps(asked), encoding="utf-8")
        reporter.say(f"tracing with optimum-intel for OpenVINO {engine.version}, which holds the whole model in memory")
        failure = run_program([engine.python, builder.__file__, request], said, None, _ENVIRONMENT)
        if failure is None and not (made / builder.DETOKENIZER).is_file():
            failure = how_it_ended("ended without a model", said)
        if failure is not None:
            if "No space left on device" in said.read_text(encoding="utf-8", errors="replace"):
                raise OutputError(f"{output}: no space left on the disk; free some and run the same command again")
            raise DscompressError(f"{folder}: optimum-intel with OpenVINO {engine.version} {failure}")
        files = [file for file in made.rglob("*") if file.is_file()]
        total = sum(file.stat().st_size for file in files)
        weights = sum(file.stat().st_size for file in files if file.stem == MODEL)
        record = {"dscompress": __version__, "openvino": engine.version, "weights": weights, "kind": kind}
        (made / MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        commit(made, output)
    return Written(output, total, weights, source.digests, source.remarks())


class _Source:
    """What is traced, and the codes that come in its place.

    Args:
        checkpoint: open.
        kind: as in `export_openvino`.
        int8_inputs: likewise.

    Attributes:
        arch: where its parts are.
        carried: grids of the modules whose codes are carried over.
        dtype: in which it is traced, so that nothing is rounded.
        digests: of what was written of them.

    Raises:
        ModelError: what can't be made.
    """

    def __init__(self, checkpoint: Checkpoint, kind: str, int8_inputs: bool) -> None:
        self.checkpoint, self.folder, self.int8_inputs = checkpoint, checkpoint.folder, int8_inputs
        self.config = traced_config(checkpoint.config, self.folder)
        view = DequantizedCheckpoint(checkpoint)
        self.view = view.unrounded()
        if view.rounds_inputs:
            raise ModelError(f"{self.folder}: {ROUNDS_INPUTS}")
        self.arch = FAMILIES.get(str(self.config["model_type"]), FAMILIES["llama"])
        self.inputs, self.caches = bool(view.inputs), bool(view.caches)
        self.carried = carried_grids(self.folder, view.grids, self._columns, kind, int8_inputs)
        kept = {info.dtype for name, info in view.tensors.items() if name.removesuffix(".weight") not in view.grids}
        rounded = kind == "f32" or len(kept) != 1
        self.dtype = torch.float32 if rounded else DTYPES.get(next(iter(kept)), torch.float32)
        self.digests = Digests()
        self._shapes: dict[str, dict[str, Any]] = {}
        self._wide: list[str] = []  # whose scales are float32

    def _columns(self, module: str) -> int:
        return int(self.view.quantized(module).codes.shape[1])

    def _is_tied(self) -> bool:
        head, embeddings = f"{self.arch.head}.weight", f"{self.arch.embeddings}.weight"
        if not says_tied(self.checkpoint.config) or self.arch.head in self.view.grids:
            return False
        if head not in self.view.tensors:
            return True
        return self.arch.embeddings not in self.view.grids and self.checkpoint.equal(head, embeddings)

    def request(self, read: Path) -> dict[str, Any]:
        """What the script is asked for, without a place for it."""
        rows = [{"module": name, "codes": name, **shape} for name, shape in self._shapes.items()]
        shared = self._shapes.get(self.arch.embeddings)
        if shared is not None and self._is_tied():
            rows.append({"module": self.arch.head, "codes": self.arch.embeddings, **shared})
        return {
            "checkpoint": str(read), "dtype": "fp32" if self.dtype == torch.float32 else None, "modules": rows,
            "codes": str(read / _CODES), "options": {} if self.int8_inputs else _UNROUNDED,
        }  # fmt: skip

    def write(self, folder: Path, reporter: Reporter) -> None:
        """Write what is traced, a dense checkpoint's weights by links, and the codes in a file of their own."""
        folder.mkdir()
        copy_side_files(self.folder, folder)
        if self.view.grids:
            self._write_weights(folder, reporter)
        else:
            for file in [*self.checkpoint.files, *self.folder.glob(INDEX)]:
                link_or_copy(file, folder / file.name)
        said = {"dtype": str(self.dtype).removeprefix("torch."), "tie_word_embeddings": self._is_tied()}
        (folder / "config.json").write_text(json.dumps(self.config | said), encoding="utf-8")

    def _write_weights(self, folder: Path, reporter: Reporter) -> None:
        """Layer by layer; a matrix with codes has about its weights there, which are replaced."""
        parts = by_layer(self.view.tensors, layers_prefix(self.view.tensors, self.checkpoint.config))
        placed: dict[str, str] = {}
        codes: dict[str, Tensor] = {}
        with reporter.task("laying out weights", len(parts), "part") as advance:
            for number, names in enumerate(parts, 1):
                file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                weights = {name: values.to(self.dtype) for name, values in self.view.load(names).items()}
                write_part(folder / file, weights, {})
                placed |= dict.fromkeys(weights, file)
                for module in [name.removesuffix(".weight") for name in names]:
                    codes |= self._codes(module) if module in self.carried else {}
                advance()
        write_part(folder / _CODES, codes, {})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")

    def _codes(self, module: str) -> dict[str, Tensor]:
        matrix = self.view.quantized(module)
        assert isinstance(matrix, Quantized), "codes of other kinds are refused"
        parts = laid_out(matrix)
        self._shapes[module] = shape_of(matrix)
        self.digests.add(module, parts)
        if parts["scales"].dtype != torch.float16 and matrix.scale.dtype != torch.float32:
            self._wide.append(module)
        return {f"{module}.{part}": values for part, values in parts.items()}

    def remarks(self) -> list[str]:
        """What of the checkpoint is not in the folder, and what is larger there."""
        grids, lines = self.view.grids, []
        if grids and not self.carried:
            lines.append(f"{len(grids)} quantized matrices are written as float32")
        if wider := [grid.bits for grid in self.carried.values() if grid.bits not in WIDTHS]:
            bits = ", ".join(f"{each}-bit" for each in sorted(set(wider)))
            lines.append(f"{bits} codes of {len(wider)} matrices take the next of {WIDTHS} bits each; none changes")
        if self._wide:
            lines.append(f"scales of {len(self._wide)} matrices are float32: float16 does not hold each of them")
        if self.inputs:
            how = "rounds them its own way" if self.int8_inputs else "leaves them (--int8-inputs lets it round them)"
            lines.append(f"the checkpoint rounds the inputs of linears to 8 bits by its own scales; OpenVINO {how}")
        if self.caches:
            lines.append("the checkpoint has scales for an 8-bit cache, which OpenVINO has no place for")
        return lines
