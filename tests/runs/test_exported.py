"""`export:` at the end of a recipe: what is in the output, made once whatever happens, refused early, told late.

A stand-in builds folders for ONNX Runtime GenAI, and says no when it is asked; tests/clients has the real one.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killable
import pytest
from command import Result, invoke
from gguf import GGUFReader
from killable import Moment
from onnx_files import refusing
from random_models import make_model

from compress.evaluation.llama_cpp import llama_cpp_missing
from compress.exports.gguf.write import export_gguf
from compress.recipe.export import ExportSpec
from compress.records import Report, read_record
from compress.runs.artefact import drop_weights
from compress.runs.cache import cache_entries, clean_cache, drop_artefact
from compress.runs.exporters import exporter_of
from compress.system.fingerprint import sha256
from compress.system.progress import Reporter

W4 = {"kind": "quantize", "method": "rtn", "bits": 4, "group_size": 32, "format": "gptq"}
RUN = ["run", "recipe.yaml", "--device", "cpu"]
asks_llama_cpp = pytest.mark.skipif(llama_cpp_missing() is not None, reason="llama.cpp is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small", intermediate_size=128, tie_word_embeddings=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compress.system.programs.CLONE", tmp_path)
    return tmp_path


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no llama.cpp."""
    monkeypatch.setattr("compress.evaluation.llama_cpp.llama_cpp_missing", lambda: "xllamacpp is not installed; get it")


def write(folder: Path, model: Path, export: list[Any], **more: Any) -> None:
    recipe = {
        "name": "tiny", "model": str(model), "stages": [W4], "evaluate": False, "output": "out", "export": export
    } | more  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def run(*more: str, code: int = 0) -> Result:
    done = invoke(*RUN, *more)
    assert done.exit_code == code, done.stderr
    return done


def report(folder: Path) -> Report:
    return Report.model_validate_json((folder / "out" / "report.json").read_bytes())


def onnx(folder: Path, **more: Any) -> dict[str, Any]:
    """An export by the stand-in."""
    return {"to": "onnx", "python": str(refusing(folder / "python", "RuntimeError: no such node").python), **more}


@asks_llama_cpp
def test_files_record_and_report(folder: Path, model: Path) -> None:
    write(folder, model, ["gguf", {"to": "gguf", "type": "q8_0", "split": "200kB"}])
    done = run()
    out = folder / "out"
    parts = ["tiny-Q8_0-00001-of-00002.gguf", "tiny-Q8_0-00002-of-00002.gguf"]
    assert sorted(file.name for file in out.glob("*.gguf")) == [*parts, "tiny.gguf"]
    assert (out / "model.safetensors").is_file()
    record = read_record(out)
    assert record is not None and {"tiny.gguf", *parts, "model.safetensors"} < set(record.files)
    assert {name: sha256(out / name) for name in record.files} == record.files
    (kept,) = (folder / ".dscompress" / "exports").glob("*/model.gguf")
    assert kept.stat().st_ino == (out / "tiny.gguf").stat().st_ino  # not a second copy
    reader = GGUFReader(out / "tiny.gguf")
    assert reader.fields["general.name"].contents() == "tiny"
    found = report(folder)
    assert found.compressed.bytes == (out / "model.safetensors").stat().st_size
    first, second = found.exports
    assert (first.name, first.files, first.bytes) == ("tiny.gguf", 1, (out / "tiny.gguf").stat().st_size)
    assert first.passed and first.pace is not None and {each.name for each in first.checks} == {"tokens", "llama.cpp"}
    assert first.carried == sum(tensor.tensor_type.name == "Q4_0" for tensor in reader.tensors) == 14
    assert (second.name, second.files) == (parts[0], 2)
    assert second.bytes == sum((out / name).stat().st_size for name in parts)
    assert second.remarks == [f"14 quantized matrices are written as Q8_0: {second.bytes / 1000:.0f} kB in all"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("exported")]
    assert len(lines) == 2 and lines[0].startswith("exported    tiny.gguf, ") and " opens it: the same but " in lines[0]


def test_a_failed_check_is_told_everywhere_and_fails_the_command(folder: Path, model: Path) -> None:
    write(folder, model, [onnx(folder, int8_inputs=True)])
    done = run(code=1)
    words = (
        "onnx does not pass in ONNX Runtime GenAI: onnx runtime: ONNX Runtime GenAI 0.18.0 does not open it: "
        "RuntimeError: no such node; do not use it"
    )
    assert f"warning: {words}" in done.stderr and "FAILS in ONNX Runtime GenAI 0.18.0; do not use it" in done.stdout
    found = report(folder)
    assert words in found.warnings and [each.passed for each in found.exports] == [False]
    page = (folder / "out" / "report.html").read_text()
    assert f"<li>{words}</li>" in page and '<li class="bad">onnx: onnx runtime: ' in page
    card = (folder / "out" / "README.md").read_text()
    assert words in card and "onnxruntime_genai.Model" not in card  # nobody is told to use it
    files = {"model.onnx", "genai_config.json", "dscompress-export.json", "command"}
    assert files < {file.name for file in (folder / "out" / "onnx").iterdir()}
    assert "accuracy_level=4" in (folder / "out" / "onnx" / "command").read_text()


def test_each_is_made_once_and_what_failed_is_asked_again(folder: Path, model: Path) -> None:
    write(folder, model, [onnx(folder)])
    for _ in range(2):
        done = run(code=1)
    assert "quantize: finished before" in done.stderr and "onnx: written before" in done.stderr
    calls = [Path(call).name for call in (folder / "calls").read_text().split()]
    assert calls == ["-m", "onnx_client.py", "onnx_client.py"]  # -m is the builder
    run("--fresh", code=1)
    assert (folder / "calls").read_text().count("-m") == 2


def test_edited_settings_are_not_those_of_the_next_output(folder: Path, model: Path) -> None:
    write(folder, model, [onnx(folder)])
    run(code=1)
    out = folder / "out" / "onnx"
    (kept,) = (folder / ".dscompress" / "exports").glob("*/onnx")
    assert (out / "model.onnx").stat().st_ino == (kept / "model.onnx").stat().st_ino
    (out / "genai_config.json").write_text("{}\n\n")
    assert (kept / "genai_config.json").read_text() == "{}\n"


@asks_llama_cpp
def test_what_llama_cpp_said_is_kept(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, model, ["gguf"])
    monkeypatch.setattr("compress.export_records.Export.busy", False)
    run()
    first = report(folder).exports
    assert "asking llama.cpp" not in run().stderr and report(folder).exports == first
    (said,) = (folder / ".dscompress" / "exports").glob("*.said.json")
    said.write_text(said.read_text().replace(str(first[0].version), "0"))  # of another version
    assert "asking llama.cpp about tiny.gguf" in run().stderr
    assert "asking llama.cpp" not in run().stderr
    monkeypatch.setattr("compress.evaluation.llama_cpp.CHECK_VERSION", 7)  # other questions
    assert "asking llama.cpp about tiny.gguf" in run().stderr


@pytest.mark.usefixtures("unasked")
def test_another_tokenizer_makes_another_file(folder: Path, model: Path) -> None:
    """It is no part of a stage's fingerprint, and it is in the file."""
    shutil.copytree(model, folder / "model")
    write(folder, folder / "model", ["gguf"])
    run()
    settings = folder / "model" / "tokenizer_config.json"
    kept = json.loads(settings.read_text()) | {"chat_template": "{{ messages[0].content }}!"}
    settings.write_text(json.dumps(kept))
    assert "quantize: finished before" in run().stderr
    reader = GGUFReader(folder / "out" / "tiny.gguf")
    assert reader.fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}!"


MOMENTS = [
    Moment("open", r"exports/.*part.*model\.gguf$"),  # the file is begun
    Moment("os.rename", r"model\.gguf -> .*exports/"),  # ... and whole, without its name
    Moment("os.rename", r"exports/\w+\.json\.tmp -> "),  # ... with it, and not noted
    Moment("os.rename", r"\.out\.part -> .*/out$"),
]


def test_killed_again_and_again(folder: Path, model: Path) -> None:
    write(folder, model, ["gguf"])
    for number, moment in enumerate(MOMENTS):
        ended = killable.run(RUN, folder, moment)
        assert ended.code == -9, (moment, ended.printed)
        assert not (folder / "out").exists()
        assert ("quantize: finished before" in ended.printed) == (number > 0)  # the stage is made once
        assert "tiny.gguf: written before" not in ended.printed
    ended = killable.run(RUN, folder)
    assert ended.code == 0 and "tiny.gguf: written before" in ended.printed, ended.printed
    (stage,) = (path.parent for path in (folder / ".dscompress" / "stages").glob("*/dscompress.json"))
    whole = export_gguf(stage, folder / "whole.gguf", reporter=Reporter(quiet=True), name="tiny").files[0]
    assert (folder / "out" / "tiny.gguf").read_bytes() == whole.read_bytes()
    assert not [file for file in (folder / ".dscompress").rglob("*") if file.name.endswith((".part", ".tmp"))]


@pytest.mark.usefixtures("unasked")
def test_verify_sees_a_changed_file(folder: Path, model: Path) -> None:
    write(folder, model, ["gguf"])
    run()
    assert invoke("verify", "out").exit_code == 0
    file = folder / "out" / "tiny.gguf"
    raw = bytearray(file.read_bytes())
    file.unlink()  # in the work folder it stays
    raw[-1000] ^= 1
    file.write_bytes(raw)
    done = invoke("verify", "out")
    assert done.exit_code == 1 and "FAIL files: changed since they were written: tiny.gguf" in done.stdout


@pytest.mark.usefixtures("unasked")
def test_what_is_ours_goes_and_what_is_not_stays(folder: Path, model: Path) -> None:
    write(folder, model, ["gguf", onnx(folder)])
    run(code=1)
    (folder / "out" / "notes.txt").write_text("mine")
    (folder / "out" / "onnx" / "notes.txt").write_text("mine, too")
    run(code=1)
    assert (folder / "out" / "onnx" / "notes.txt").read_text() == "mine, too"
    write(folder, model, [])
    run()
    assert not list((folder / "out").glob("*.gguf"))
    assert [file.name for file in (folder / "out" / "onnx").iterdir()] == ["notes.txt"]
    assert (folder / "out" / "notes.txt").read_text() == "mine" and report(folder).exports == []


def foreign(folder: Path) -> None:
    (folder / "out" / "onnx").mkdir()
    (folder / "out" / "onnx" / "thesis.txt").write_text("years of work")


def test_something_of_the_users_by_the_name_is_refused_before_any_work(folder: Path, model: Path) -> None:
    write(folder, model, [])
    run()
    foreign(folder)
    write(folder, model, [onnx(folder)], stages=[W4 | {"bits": 8}])
    done = run(code=2)
    assert done.stderr.endswith(f"error: {folder}/out/onnx: exists, and was not written by dscompress; name another "
                                "folder, or remove it\n")  # fmt: skip
    assert "rtn 8-bit" not in done.stderr


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str, str]] = {
    "layers kept": (
        onnx, {"stages": [W4 | {"ignore": ["*.down_proj"]}]}, "llama",
        "model.layers.0.mlp.down_proj and 1 more linears kept their weights, and ONNX Runtime GenAI's builder takes "
        "all linears of the layers as codes or none; quantize them too (8 bits are kept as they are), or use type: f32",
    ),
    "fp8": (
        onnx, {"stages": [{"kind": "quantize", "method": "dynamic", "dtype": "fp8"}]}, "llama",
        "model.layers.0.mlp.down_proj has float8 weights, and MatMulNBits takes whole numbers; use type: f32, or "
        "quantize it otherwise",
    ),
    "no codes": (
        lambda folder: onnx(folder, int8_inputs=True),
        {"stages": [{"kind": "prune", "shape": {"intermediate_size": 64}}]}, "llama",
        "has no codes here, and ONNX Runtime rounds inputs only of linears that do; leave out int8_inputs: true",
    ),
    "a family that ONNX can't have": (
        onnx, {}, "gemma3_text",
        "ONNX Runtime GenAI's builder does not make 'gemma3_text' models rightly; supported: llama, mistral, qwen2, "
        "qwen3, gemma, gemma2, phi3 (for others, use to: gguf)",
    ),
    "a family that llama.cpp can't have": (
        lambda folder: "gguf", {}, "opt", "model_type 'opt' can't be written as GGUF here; supported: llama, mistral",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_written_is_refused_before_any_work(name: str, folder: Path) -> None:
    export, more, family, words = REFUSED[name]
    model = make_model(folder / "model", family, intermediate_size=128)
    write(folder, model, [export(folder)], **more)
    for arguments in ((), ("--dry-run",)):
        done = run(*arguments, code=2)
        assert f"error: export.0: {model}: {words}" in done.stderr
    assert not (folder / "out").exists() and not (folder / ".dscompress").exists()


def test_what_writes_is_an_error_where_it_is_missing(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, model, ["gguf", "onnx"])
    monkeypatch.setattr("compress.system.extras.find_spec", lambda name: None)
    monkeypatch.setattr("compress.system.programs.find_spec", lambda name: None)
    done = run(code=2)
    assert done.stderr.splitlines()[-2:] == [
        "error: export.0: gguf is not installed; pip install 'dscompress[gguf]'",
        f"error: export.1: ONNX Runtime GenAI is not installed here and there is no .venv-ort in {folder}; pip install "
        "'dscompress[onnx]', or name the Python of an environment that has it",
    ]
    assert not (folder / ".dscompress").exists()


@pytest.mark.usefixtures("unasked")
def test_what_only_asks_is_a_note_where_it_is_missing(folder: Path, model: Path) -> None:
    write(folder, model, ["gguf"])
    done = run()
    assert "warning: export.0: llama.cpp will not be asked: xllamacpp is not installed; get it" in done.stderr
    (found,) = report(folder).exports
    assert found.passed is None and found.checks == [] and found.note == "xllamacpp is not installed; get it"
    assert "tiny.gguf, " in done.stdout and "llama.cpp was not asked: xllamacpp is not installed; get it" in done.stdout


KEPT = (
    "; the checkpoint is there without it, and all stages are kept: mend this or remove the export, and run the same "
    "command again"
)


@pytest.mark.usefixtures("unasked")
def test_what_fails_in_the_end_says_that_the_stages_are_kept(folder: Path, model: Path) -> None:
    export = onnx(folder)
    whole = (folder / "python").read_text()
    (folder / "python").write_text(whole.replace('mkdir "$6"', "echo KeyError: 7; exit 1"))
    write(folder, model, [export, "gguf"])
    done = run(code=1)
    (failed, gguf), out = report(folder).exports, folder / "out"
    assert failed.failure is not None and failed.failure.endswith(
        "ONNX Runtime GenAI 0.18.0's builder ended without an answer (KeyError: 7)"
    )
    said = f"export.0: onnx could not be written: {failed.failure}{KEPT}"
    assert f"warning: {said}\n" in done.stderr and said in report(folder).warnings
    assert f"exported    onnx: COULD NOT BE WRITTEN: {failed.failure}\n" in done.stdout
    assert (failed.name, failed.files, failed.bytes, failed.passed) == ("onnx", 0, 0, False)
    assert gguf.name == "tiny.gguf" and (out / "tiny.gguf").is_file() and not (out / "onnx").exists()
    assert invoke("verify", "out").exit_code == 0
    (folder / "python").write_text(whole)
    again = run(code=1).stderr  # the stand-in says no
    assert "quantize: finished before" in again and "tiny.gguf: written before" in again
    assert (out / "onnx" / "model.onnx").is_file() and report(folder).exports[0].failure is None


ANY = [
    (MemoryError("of 7 GB"), "MemoryError: of 7 GB"),
    (OSError(28, "No space left"), "OSError: [Errno 28] No space left"),
]


@pytest.mark.parametrize(("error", "words"), ANY, ids=lambda value: type(value).__name__)
def test_whatever_writing_raises_the_output_is_there(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr("compress.runs.exporters.ForFolder.write", raising(error))
    write(folder, model, [onnx(folder)])
    run(code=1)
    assert [each.failure for each in report(folder).exports] == [words]
    assert read_record(folder / "out") is not None and (folder / "out" / "model.safetensors").is_file()


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def test_whatever_asking_raises_is_a_failed_check(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, model, [onnx(folder)])
    with monkeypatch.context() as patched:
        patched.setattr("compress.runs.exporters.ForFolder.ask", raising(MemoryError("of 7 GB")))
        done = run(code=1)
    words = "ONNX Runtime GenAI: could not be asked: MemoryError: of 7 GB"
    assert f"warning: onnx does not pass in ONNX Runtime GenAI: {words}; do not use it" in done.stderr
    (found,) = report(folder).exports
    assert [(each.name, each.passed) for each in found.checks] == [("ONNX Runtime GenAI", False)]
    assert (folder / "out" / "onnx" / "model.onnx").is_file()
    again = run(code=1).stderr
    assert "onnx: written before" in again and "asking ONNX Runtime GenAI about onnx" in again


@pytest.mark.parametrize("what", ["write", "ask"])
def test_who_interrupts_stops_it(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(f"compress.runs.exporters.ForFolder.{what}", raising(KeyboardInterrupt()))
    write(folder, model, [onnx(folder)])
    assert invoke(*RUN).exit_code == 130
    assert not (folder / "out").exists()


def changed(file: Path) -> None:
    """Of a file, one byte, in place."""
    with file.open("r+b") as opened:
        opened.seek(-1000, 2)
        old = opened.read(1)
        opened.seek(-1000, 2)
        opened.write(bytes([old[0] ^ 1]))


@pytest.mark.usefixtures("unasked")
def test_a_file_that_has_changed_is_written_again(folder: Path, model: Path) -> None:
    write(folder, model, ["gguf", onnx(folder)])
    run(code=1)
    file = folder / "out" / "tiny.gguf"
    whole = file.read_bytes()
    changed(file)  # which is the one in the work folder too
    (kept,) = (folder / ".dscompress" / "exports").glob("*/onnx")
    (kept / "genai_config.json").write_text("{}\n\n")
    said = run(code=1).stderr
    for name, where in (("tiny.gguf", r"\w+"), ("onnx", kept.parent.name)):
        assert re.search(rf"{name}: changed in \S+/exports/{where} since it was written; writing it again", said)
    assert file.read_bytes() == whole and (kept / "genai_config.json").read_text() == "{}\n"
    assert invoke("verify", "out").exit_code == 0
    assert "writing it again" not in run(code=1).stderr


def test_a_file_that_changes_while_it_is_asked_about_does_not_pass_for_whole(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_: object, __: Path, written: Any, *___: object) -> Any:
        (written.folder / "model.onnx").write_text("54321")
        return [], None

    monkeypatch.setattr("compress.runs.exporters.ForFolder.ask", ask)
    write(folder, model, [onnx(folder)])
    run()
    done = invoke("verify", "out")
    assert done.exit_code == 1 and "FAIL files: changed since they were written: onnx/model.onnx" in done.stdout


@pytest.mark.usefixtures("unasked")
def test_the_models_name_matters_where_it_is_in_the_file(folder: Path, model: Path) -> None:
    write(folder, model, ["gguf", onnx(folder)])
    run(code=1)
    write(folder, model, ["gguf", onnx(folder)], name="other")
    said = run(code=1).stderr
    assert "onnx: written before" in said and "other.gguf: written before" not in said
    assert GGUFReader(folder / "out" / "other.gguf").fields["general.name"].contents() == "other"


def test_what_else_is_in_the_environment_matters(folder: Path, model: Path) -> None:
    write(folder, model, [onnx(folder)])
    run(code=1)
    python = folder / "python"
    python.write_text(python.read_text().replace("echo 0.18.0;", "echo 0.18.0; echo transformers 5.1;"))
    assert "onnx: written before" not in run(code=1).stderr and report(folder).exports[0].version == "0.18.0"
    assert "onnx: written before" in run(code=1).stderr


MODULES = {"gguf": "llama_cpp", "onnx": "onnx_runtime", "openvino": "openvino_runtime"}


@pytest.mark.parametrize("to", MODULES)
def test_each_knows_the_version_of_its_questions(folder: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    monkeypatch.setattr(f"compress.evaluation.{MODULES[to]}.CHECK_VERSION", 7)
    python = None if to == "gguf" else onnx(folder)["python"]
    assert exporter_of(ExportSpec.model_validate({"to": to, "python": python})).check_version == 7


def test_a_dry_run_says_what_will_be_written(folder: Path, model: Path) -> None:
    write(folder, model, ["gguf", onnx(folder)])
    lines = [line for line in run("--dry-run").stdout.splitlines() if line.startswith("export")]
    assert lines == [
        "export   tiny.gguf for llama.cpp: about 567 kB, and 567 kB in the work folder",
        "export   onnx for ONNX Runtime GenAI: about 1.10 MB, and 2.19 MB in the work folder",
    ]
    assert not (folder / ".dscompress").exists()


@pytest.mark.usefixtures("unasked")
def test_weights_that_are_not_kept_go_with_their_exports(folder: Path, model: Path) -> None:
    """As of points of a sweep."""
    write(folder, model, ["gguf", onnx(folder)])
    run(code=1)
    out, work = folder / "out", folder / ".dscompress"
    record = read_record(out)
    assert record is not None
    drop_weights(out)
    left = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert not {name for name in left if name.endswith((".safetensors", ".gguf", ".onnx"))}
    assert {"report.json", "config.json", "dscompress.json"} < left
    drop_artefact(work, record.fingerprint)
    assert not [entry for entry in cache_entries(work) if entry.kind in ("stages", "exports")]


def test_the_cache_command_knows_them(folder: Path, model: Path) -> None:
    write(folder, model, [onnx(folder)])
    run(code=1)
    kinds = {entry.kind for entry in cache_entries(folder / ".dscompress")}
    assert "exports" in kinds and clean_cache(folder / ".dscompress") > 0
    assert not any((folder / ".dscompress").rglob("*.onnx"))
