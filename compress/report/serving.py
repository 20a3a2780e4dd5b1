"""How to run a finished checkpoint: the commands of the programs that open it, as the README's table says."""

from dataclasses import dataclass
from pathlib import PurePath

from compress.export_records import Export
from compress.formats.openers import VLLM_BITS
from compress.records import Report
from compress.report import figures

_PACKAGES = {
    "gptq": "transformers optimum gptqmodel",
    "compressed-tensors": "transformers compressed-tensors",
    "torchao": "transformers torchao",
}
_ONNX = (
    "python -m onnxruntime_genai.models.builder -i {path} -o onnx -p int4 -e cpu -c cache --extra_options "
    "hf_token=false shared_embeddings=false nodes_to_exclude=/lm_head/MatMul accuracy_level=0"
)
_FOLDERS = {  # that are written beside a checkpoint, and how each is opened
    "onnx": 'pip install onnxruntime-genai\nmodel = onnxruntime_genai.Model("{place}")',
    "openvino": 'pip install openvino-genai\npipe = openvino_genai.LLMPipeline("{place}", "CPU")\n'
    'pipe.generate("The capital of France is", max_new_tokens=32)',
}


@dataclass(frozen=True)
class Way:
    """A program that opens the checkpoint.

    Args:
        name: the program's.
        command: what to type.
        note: what to know first; empty where there is nothing.
    """

    name: str
    command: str
    note: str = ""


def path_of(report: Report) -> str:
    """The checkpoint, as commands that are shown to others name it."""
    return f"path/to/{PurePath(report.compressed.path).name}"


def packages(report: Report) -> str:
    """What transformers needs to be installed with."""
    return _PACKAGES.get(report.compressed.format or "", "transformers")


def ways(report: Report) -> list[Way]:
    """The programs that open the checkpoint; servers first."""
    path, found = path_of(report), list[Way]()
    if report.compressed.file is not None:
        return [_llama_cpp(f"{path}/{report.compressed.file}", report.compressed.files or 1)]
    if (note := _vllm(report)) is not None:
        found.append(Way("vLLM", f"vllm serve {path}", note))
    found += [_exported(path, export) for export in report.exports if export.passed is not False]
    if _onnx(report) and not any(export.to == "onnx" for export in report.exports):
        found.append(
            Way("ONNX Runtime GenAI", _ONNX.format(path=path), "keeps the codes; for gemma3 and phi3 it fails")
        )
    opened = f'model = AutoModelForCausalLM.from_pretrained("{path}")'
    slow = "to check and to try; 4-bit weights are unpacked as it goes" if report.compressed.format else ""
    return [*found, Way("transformers", f"pip install {packages(report)}\n{opened}", slow)]


def _llama_cpp(file: str, parts: int) -> Way:
    """The program that opens a .gguf file, and what is built on it."""
    command = f"llama-cli -m {file}\nllama-server -m {file} --port 8080"
    note = "Ollama, LM Studio and others that run llama.cpp open the same file"
    if parts > 1:
        note = f"given the first of {parts} parts; llama-gguf-split --merge joins them for programs that want one file"
    return Way("llama.cpp", command, note)


def _exported(path: str, export: Export) -> Way:
    """The program that something beside the checkpoint was written for."""
    place = f"{path}/{export.name}"
    if export.to == "gguf":
        return _llama_cpp(place, export.files)
    return Way(export.program, _FOLDERS[export.to].format(place=place), "its folder beside the checkpoint")


def _vllm(report: Report) -> str | None:
    """What to know before vLLM opens it; None where it does not."""
    if report.served is not None and not report.served.passed:  # it was asked
        return None
    stage, name = figures.quantized_stage(report), report.compressed.format
    if stage is None or name is None:
        return "" if name is None else None
    spec, modules = stage.spec, [row.module for row in figures.matrices(report)]
    bits = {module.bits for module in modules}
    if name == "gptq":
        return None if spec.get("symmetric") is False else "" if bits == {4} else "on a GPU"
    if name != "compressed-tensors" or not bits <= VLLM_BITS or spec.get("embeddings"):
        return None
    inputs = {module.inputs for module in modules}
    if inputs == {None}:
        return "on a GPU" if 8 in bits else ""
    return "on a GPU" if spec.get("dtype") == "fp8" and inputs != {"dynamic"} else ""


def _onnx(report: Report) -> bool:
    """Whether ONNX Runtime GenAI's builder takes it as it is."""
    stage, modules = figures.quantized_stage(report), [row.module for row in figures.matrices(report)]
    if stage is None or report.compressed.format != "gptq" or stage.spec.get("ignore") or stage.spec.get("lm_head"):
        return False
    return all(module.bits in (2, 4, 8) and module.group_size in (64, 128) for module in modules)
