"""A checkpoint as a folder for ONNX Runtime GenAI, made by its own model builder in a process of its own.

The builder makes the graph. Weights reach it in a form that it takes over as it is: a dense checkpoint's own files, or
the codes of a quantized one in the format of Olive, whose layout is that of the file. Its defaults would round more
than the checkpoint did (4-bit output head, 8-bit inputs of linears); the options here leave both alone.

Left out: float16 and bfloat16 (the builder makes them for GPUs; of ONNX Runtime 1.32 on a CPU the float16 graph fails
at the second token) and rounding by the builder itself.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress import __version__
from compress.errors import DscompressError, ModelError, OutputError
from compress.exports.marked import MARK, check_replaceable, folder_facts
from compress.exports.onnx.carried import HEAD, Asked, carried_grids
from compress.exports.onnx.codes import WIDTHS, Digests, joined_last, laid_out, pack
from compress.exports.onnx.config import builder_config, target_of
from compress.exports.refused import ROUNDS_INPUTS
from compress.formats.dequantized import DequantizedCheckpoint
from compress.formats.patterns import has_number
from compress.model.checkpoint import INDEX, Checkpoint, write_part
from compress.model.layout import by_layer
from compress.model.names import layers_prefix, says_tied
from compress.model.side_files import copy_side_files
from compress.quant.grid import Grid, Quantized
from compress.system.files import beside, commit, link_or_copy, make_writable, writing
from compress.system.programs import Engine, how_it_ended, run_program
from compress.system.progress import Reporter
from compress.system.units import size

CODE_VERSION = 1  # raised when the same checkpoint gives other files
MODEL = "model.onnx"
_RUN = (
    "import onnxruntime_genai as og; model = og.Model({}); tokenizer = og.Tokenizer(model); "
    "how = og.GeneratorParams(model); how.set_search_options(max_length=64); made = og.Generator(model, how); "
    'made.append_tokens(tokenizer.encode("Once upon a time")); [made.generate_next_token() for _ in range(32)]; '
    "print(tokenizer.decode(made.get_sequence(0)))"
)
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}  # what lies in the current folder is no library
_EMBEDDINGS = "model.embed_tokens"


@dataclass(frozen=True)
class Written:
    """A model in a folder for ONNX Runtime GenAI.

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
        """How many matrices have the checkpoint's own codes."""
        return len(self.codes)

    def facts(self) -> list[tuple[str, str]]:
        """What was written, a word and what it says, for people."""
        return folder_facts(self.folder, self.bytes, self.weights, MODEL, self.carried, _RUN)


def export_onnx(
    folder: Path,
    output: Path,
    engine: Engine,
    kind: str = "auto",
    int8_inputs: bool = False,
    reporter: Reporter | None = None,
) -> Written:
    """Write a checkpoint as a folder that ONNX Runtime GenAI opens.

    Args:
        folder: the checkpoint, dense or quantized.
        output: the folder to write; it appears whole or not at all.
        engine: the environment whose builder makes it.
        kind: "auto" keeps the codes of a quantized checkpoint, "f32" writes all weights as float32.
        int8_inputs: let ONNX Runtime round the inputs of quantized linears to 8 bits as it runs, which is faster.
        reporter: told what happens.

    Raises:
        ModelError: what the builder can't make, by name.
        OutputError: a folder of another program has the name, or the disk is full.
        DscompressError: the builder failed, in its own words.
    """
    reporter = reporter or Reporter()
    source = _Source(Checkpoint(folder), kind, int8_inputs)
    check_replaceable(output)
    make_writable(output.parent)
    with writing(output.parent), beside(output) as scratch:
        read = source.write(scratch / "read", reporter)
        made, said = scratch / "made", scratch / "said.txt"
        reporter.say(f"building with ONNX Runtime GenAI {engine.version}, which takes about as long as writing it")
        command = [
            *(engine.python, "-m", "onnxruntime_genai.models.builder", "-i", read, "-o", made),
            *("-p", "int4" if source.carried else "fp32", "-e", "cpu", "-c", scratch / "cache"),
            *("--extra_options", *(f"{name}={value}" for name, value in source.options.items())),
        ]
        failure = run_program(command, said, None, _ENVIRONMENT)
        if failure is None and not (made / "genai_config.json").is_file():
            failure = how_it_ended("ended without a model", said)
        if failure is not None:
            if _disk_is_full(said):
                raise OutputError(f"{output}: no space left on the disk; free some and run the same command again")
            raise DscompressError(f"{folder}: ONNX Runtime GenAI {engine.version}'s builder {failure}")
        files = [file for file in made.rglob("*") if file.is_file()]
        total = sum(file.stat().st_size for file in files)
        weights = sum(file.stat().st_size for file in files if file.name.startswith(MODEL))
        record = {"dscompress": __version__, "onnxruntime-genai": engine.version, "weights": weights, "kind": kind}
        (made / MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        commit(made, output)
    return Written(output, total, weights, source.digests, source.remarks(weights))


def _disk_is_full(said: Path) -> bool:
    return "No space left on device" in said.read_text(encoding="utf-8", errors="replace")


class _Source:
    """What the builder reads.

    Args:
        checkpoint: open.
        kind: as in `export_onnx`.
        int8_inputs: likewise.

    Attributes:
        view: the checkpoint, dense.
        weights: the same, without what its runtime would round.
        carried: grids in ONNX of the modules whose codes are carried over.
        bits: of these codes in the checkpoint.
        digests: of what was written of them.

    Raises:
        ModelError: what the builder can't make.
    """

    def __init__(self, checkpoint: Checkpoint, kind: str, int8_inputs: bool) -> None:
        self.checkpoint, self.folder, self.kind, self.int8_inputs = checkpoint, checkpoint.folder, kind, int8_inputs
        self.config = builder_config(checkpoint.config, self.folder)
        self.target = target_of(checkpoint.config, self.folder)
        self.view = DequantizedCheckpoint(checkpoint)
        self.weights = self.view.unrounded()
        if self.view.rounds_inputs:
            raise ModelError(f"{self.folder}: {ROUNDS_INPUTS}")
        self.carried = self._grids()
        self.bits = {module: grid.bits for module in self.carried if isinstance(grid := self.view.grids[module], Grid)}
        self.digests = Digests()

    def _grids(self) -> dict[str, Grid]:
        """Grids in ONNX of all linears; none of a dense checkpoint."""
        linears = [
            name.removesuffix(".weight") for name, info in self.view.tensors.items()
            if has_number(name) and len(info.shape) == 2
        ]  # fmt: skip
        asked = Asked(self.kind, self.int8_inputs)
        return carried_grids(self.folder, self.view.grids, self._columns, linears, self.target, asked)

    def _columns(self, module: str) -> int:
        return int(self.view.quantized(module).codes.shape[1])

    @property
    def options(self) -> dict[str, str]:
        """Of the builder: nothing is rounded that the checkpoint has not rounded."""
        shared = not self.carried.get(HEAD) and self._is_tied()
        options = {"hf_token": "false", "shared_embeddings": str(shared).lower(), "windowed_kv_cache": "false"}
        if self.carried:
            options["nodes_to_exclude"] = "/lm_head/MatMul,/model/embed_tokens/Gather"
            options["accuracy_level"] = "4" if self.int8_inputs else "1"
        return options

    def _is_tied(self) -> bool:
        head, embeddings = f"{HEAD}.weight", f"{_EMBEDDINGS}.weight"
        if not says_tied(self.checkpoint.config) or HEAD in self.view.grids:
            return False
        return head not in self.view.tensors or self.checkpoint.equal(head, embeddings)

    def write(self, folder: Path, reporter: Reporter) -> Path:
        """Write what the builder reads, a dense checkpoint's weights by links; returns the folder."""
        folder.mkdir()
        copy_side_files(self.folder, folder)
        config = dict(self.config)
        if self.view.grids:
            config |= {"dtype": "float32"} | self._quantization()
            self._write_weights(folder, reporter)
        else:
            for file in [*self.checkpoint.files, *self.folder.glob(INDEX)]:
                link_or_copy(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    def _write_weights(self, folder: Path, reporter: Reporter) -> None:
        """Layer by layer."""
        parts = by_layer(self.view.tensors, layers_prefix(self.view.tensors, self.checkpoint.config))
        placed: dict[str, str] = {}
        with reporter.task("laying out weights", len(parts), "part") as advance:
            for number, names in enumerate(parts, 1):
                file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                tensors = self._tensors(names)
                write_part(folder / file, tensors, {})
                placed |= dict.fromkeys(tensors, file)
                advance()
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")

    def _quantization(self) -> dict[str, Any]:
        """What config.json says of the codes, in the words of Olive; nothing where there are none."""
        schemes = {name: {"bits": grid.bits, "group_size": grid.group_size} for name, grid in self.carried.items()}
        if not schemes:
            return {}
        usual = next(iter(schemes.values()))
        return {"quantization_config": {"quant_method": "olive", **usual, "overrides": schemes}}

    def _tensors(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in sorted(names, key=joined_last):
            module = name.removesuffix(".weight")
            if module not in self.carried:
                values = self.weights.load([name])[name]
                found[name] = values.float() if self.target.exact else values
                continue
            matrix = self.view.quantized(module)
            assert isinstance(matrix, Quantized), "codes of other kinds are refused"
            packed = pack(laid_out(matrix, self.carried[module]))
            found |= {f"{module}.{part}": values for part, values in packed.items()}
            self.digests.add(module, packed)
        return found

    def remarks(self, weights: int) -> list[str]:
        """What of the checkpoint is not in the folder, and what is larger there."""
        grids, lines = self.view.grids, []
        if grids and not self.carried:
            lines.append(f"{len(grids)} quantized matrices are written as float32: {size(weights)} in all")
        if dense := [name for name in grids if self.carried and name not in self.carried]:
            lines.append(f"{', '.join(dense)} is written as float32: the builder knows no codes of it")
        if wider := [name for name, grid in self.carried.items() if grid.bits > self.bits[name]]:
            bits = ", ".join(sorted({f"{self.bits[name]}-bit" for name in wider}))
            lines.append(f"{bits} codes of {len(wider)} matrices take the next of {WIDTHS} bits each; none changes")
        if self.view.inputs:
            how = (
                "rounds them block by block" if self.int8_inputs else "has them in float32 (--int8-inputs rounds them)"
            )
            lines.append(f"the checkpoint rounds the inputs of linears to 8 bits by its own scales; ONNX Runtime {how}")
        if not self.int8_inputs and any(grid.bits != 4 for grid in self.carried.values()):
            lines.append(
                "codes of 2 and 8 bits are slow with inputs in float32; --int8-inputs makes them several times faster"
            )
        if self.view.caches:
            lines.append("the checkpoint has scales for an 8-bit cache; the cache of ONNX Runtime is float32")
        head = 4 * math.prod(self.view.tensors[f"{_EMBEDDINGS}.weight"].shape)
        if self.carried and HEAD not in self.carried and not self._is_tied() and head > weights // 5:
            lines.append(
                f"{size(head)} of {size(weights)} is the output head in float32; `lm_head: true` in the recipe's "
                "quantize stage makes codes of it too"
            )
        return lines
