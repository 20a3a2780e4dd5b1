"""`split` of a stage with `format: gguf`: the planned files to the byte, stages kept, earlier parts gone, one model."""

import json
import re
from pathlib import Path
from typing import Any

import killable
import pytest
import torch
from command import Result, invoke
from killable import Moment
from random_models import make_model
from safetensors.torch import load_file

from compress.evaluation.llama_cpp import llama_cpp_missing
from compress.exports.gguf.write import export_gguf
from compress.model.gguf.convert import convert
from compress.model.gguf.header import open_gguf
from compress.model.source import gguf_of, parts_of
from compress.recipe.gguf import GgufStage
from compress.records import Report, read_record
from compress.runs.cache import cache_entries, drop_artefact
from compress.system.fingerprint import sha256
from compress.system.progress import Reporter

STAGE = {"kind": "quantize", "format": "gguf", "type": "q8_0", "method": "rtn"}
RUN = ["run", "recipe.yaml", "--device", "cpu"]
asks_llama_cpp = pytest.mark.skipif(llama_cpp_missing() is not None, reason="llama.cpp is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tensors take 0.6 MB in q8_0, the embeddings 0.28 MB of them, and as much the head."""
    return make_model(tmp_path_factory.mktemp("models") / "small", intermediate_size=128)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no llama.cpp; the module that takes the name from the other is patched first."""
    for module in ("llama_cpp_served", "llama_cpp"):
        monkeypatch.setattr(f"compress.evaluation.{module}.llama_cpp_missing", lambda: "xllamacpp is not installed")


def write(folder: Path, model: Path, split: str | None, stages: tuple[Any, ...] = (), **more: Any) -> None:
    last = STAGE | ({} if split is None else {"split": split}) | more
    recipe = {"name": "tiny", "model": str(model), "stages": [*stages, last], "evaluate": False, "output": "out"}
    recipe["calibration"] = {"source": "text.txt", "samples": 4, "sequence_length": 32}
    (folder / "text.txt").write_text("The river runs past the old mill and the new bridge. " * 60)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def run(*more: str, code: int = 0) -> Result:
    done = invoke(*RUN, *more)
    assert done.exit_code == code, done.stderr
    return done


def planned() -> dict[str, int]:
    """Names and bytes by the dry run."""
    lines = re.findall(r"^file +(\S+): ([\d,]+) bytes \(", run("--dry-run").stdout, re.MULTILINE)
    return {name: int(taken.replace(",", "")) for name, taken in lines}


def left(folder: Path) -> dict[str, int]:
    """Names and bytes of .gguf files with weights in the output."""
    files = sorted((folder / "out").glob("*.gguf"))
    return {file.name: file.stat().st_size for file in files if "imatrix" not in file.name}


def parts(count: int) -> list[str]:
    return [f"tiny-Q8_0-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


@pytest.mark.usefixtures("unasked")
def test_the_parts_are_the_planned_ones_and_one_model(folder: Path, model: Path) -> None:
    write(folder, model, "200kB")
    expected = planned()
    assert not (folder / ".dscompress").exists()
    run()
    assert left(folder) == expected and list(expected) == parts(3)
    out = folder / "out"
    assert not list(out.glob("*.safetensors*"))
    record = read_record(out)
    assert record is not None and set(parts(3)) < set(record.files) and record.stage.spec["split"] == 200_000
    assert {name: sha256(out / name) for name in record.files} == record.files
    report = Report.model_validate_json((out / "report.json").read_bytes())
    assert (report.compressed.file, report.compressed.files) == (parts(3)[0], 3)
    assert report.compressed.bytes == report.stages[-1].bytes == sum(expected.values())
    forecast = report.stages[-1].forecast
    assert forecast is not None and (forecast.output_bytes, forecast.about) == (sum(expected.values()), False)
    assert report.size_ratio == report.base.bytes / sum(expected.values())
    card = (out / "README.md").read_text()
    assert f"The weights are in `{parts(3)[0]}` and the 2 other parts beside it, for llama.cpp" in card
    assert f"llama-server -m path/to/out/{parts(3)[0]}" in card and "the first of 3 parts" in card
    (stage,) = (path.parent for path in (folder / ".dscompress" / "stages").glob("*/dscompress.json"))
    whole = export_gguf(stage, folder / "whole.gguf", reporter=Reporter(quiet=True), name="tiny").files[0]
    read = []
    for number, file in enumerate((whole, out / parts(3)[0])):
        (folder / str(number)).mkdir()
        convert(file, folder / str(number))
        read.append(load_file(folder / str(number) / "model.safetensors"))
    assert read[0].keys() == read[1].keys() and all(torch.equal(read[0][name], read[1][name]) for name in read[0])
    assert open_gguf(whole).keys.items() <= open_gguf(out / parts(3)[0]).keys.items()


@asks_llama_cpp
def test_llama_cpp_opens_them_and_so_does_every_command(folder: Path, model: Path) -> None:
    write(folder, model, "200kB")
    recipe = json.loads((folder / "recipe.yaml").read_text()) | {"serve": True}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    done = run()
    served = Report.model_validate_json((folder / "out" / "report.json").read_bytes()).served
    assert served is not None and served.opened and served.passed and served.speed is not None, done.stderr
    for given in ("out", f"out/{parts(3)[1]}"):
        done = invoke("verify", given)
        assert done.exit_code == 0, done.stdout
        assert f"{sum(left(folder).values()):,} bytes, as it was written" in done.stdout
    done = invoke("eval", model, "out", "--windows", "1", "--sequence-length", "32", "--device", "cpu")
    assert done.exit_code == 0 and json.loads(done.stdout)["kl"]["mean"] < 0.1, done.stderr


@pytest.mark.usefixtures("unasked")
def test_another_size_takes_the_stage_and_writes_the_output_anew(folder: Path, model: Path) -> None:
    write(folder, model, "200kB")
    run()
    (folder / "out" / "notes.txt").write_text("mine")
    for split, names in (
        ("400kB", parts(2)),
        ("1GB", ["tiny-Q8_0.gguf"]),
        (None, ["tiny-Q8_0.gguf"]),
        ("200kB", parts(3)),
    ):
        write(folder, model, split)
        assert list(planned()) == names
        assert "when it ran before" in run("--dry-run").stdout
        said = run().stderr
        assert "quantize: finished before" in said and "layer" not in said
        assert list(left(folder)) == names
        report = Report.model_validate_json((folder / "out" / "report.json").read_bytes())
        wanted = None if split is None else GgufStage.model_validate(STAGE | {"split": split}).split
        record = read_record(folder / "out")
        assert record is not None and record.stage.spec["split"] == report.stages[0].spec["split"] == wanted
        assert {name for name in record.files if name.endswith(".gguf")} == set(names)
        assert report.compressed.files == len(names)
    assert "tiny-Q8_0.gguf: written before" in said  # the first of all, which is kept
    assert (folder / "out" / "notes.txt").read_text() == "mine"


def test_it_is_no_part_of_the_stages_identity() -> None:
    stages = [GgufStage.model_validate(STAGE | more) for more in ({}, {"split": "4GB"}, {"split": "1GiB"})]
    assert len({json.dumps(stage.identity()) for stage in stages}) == 1 and "split" not in stages[0].identity()


MOMENTS = [
    Moment("open", r"exports/.*part.*-00002-of-00003\.gguf$"),  # begun
    Moment("os.rename", r"-00001-of-00003\.gguf -> .*exports/"),  # whole, without names
    Moment("os.rename", r"-00002-of-00003\.gguf -> .*exports/"),  # one of them has its name
    Moment("os.rename", r"exports/\w+\.json\.tmp -> "),  # not noted
    Moment("os.link", r"-00002-of-00003\.gguf -> .*\.out\.part/"),  # on its way into the output
    Moment("os.rename", r"\.out\.part -> .*/out$"),
]


def test_killed_again_and_again(folder: Path, model: Path) -> None:
    """An output of two parts is there, whole, until that of three is."""
    write(folder, model, "400kB")
    assert killable.run(RUN, folder).code == 0
    before = {file.name: sha256(file) for file in (folder / "out").glob("*.gguf")}
    assert sorted(before) == parts(2)
    write(folder, model, "200kB")
    for moment in MOMENTS:
        ended = killable.run(RUN, folder, moment)
        assert ended.code == -9, (moment, ended.printed)
        assert "quantize: finished before" in ended.printed
        there = folder / ("out" if moment is not MOMENTS[-1] else ".out.old")
        assert {file.name: sha256(file) for file in there.glob("*.gguf")} == before
    ended = killable.run(RUN, folder)
    assert ended.code == 0 and "tiny-Q8_0.gguf: written before" in ended.printed, ended.printed
    assert list(left(folder)) == parts(3)
    (stage,) = (path.parent for path in (folder / ".dscompress" / "stages").glob("*/dscompress.json"))
    made = export_gguf(stage, folder / "whole.gguf", split_bytes=200_000, reporter=Reporter(quiet=True), name="tiny")
    for name, file in zip(parts(3), made.files, strict=True):
        assert (folder / "out" / name).read_bytes() == file.read_bytes()
    assert not [file for file in (folder / ".dscompress").rglob("*") if file.name.endswith((".part", ".tmp"))]


@pytest.mark.usefixtures("unasked")
def test_a_part_that_is_changed_or_gone_is_seen(folder: Path, model: Path) -> None:
    write(folder, model, "200kB")
    run()
    second, third = (folder / "out" / name for name in parts(3)[1:])
    raw = bytearray(second.read_bytes())
    raw[-1000] ^= 1
    second.write_bytes(raw)  # which is the one in the work folder too
    done = invoke("verify", "out")
    assert done.exit_code == 1 and f"changed since it was written: {second.name}" in done.stdout
    assert "since it was written; writing it again" in run().stderr
    assert invoke("verify", "out").exit_code == 0
    third.unlink()
    done = invoke("verify", "out")
    assert done.exit_code == 2 and f"{third.name} missing, put all parts in one folder" in done.stderr


@pytest.mark.usefixtures("unasked")
def test_what_a_stage_made_goes_with_it(folder: Path, model: Path) -> None:
    """As of points of a sweep."""
    write(folder, model, "200kB")
    run()
    record = read_record(folder / "out")
    assert record is not None
    drop_artefact(folder / ".dscompress", record.fingerprint)
    assert not [entry for entry in cache_entries(folder / ".dscompress") if entry.kind in ("stages", "exports")]


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
    "a mix": ({"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}, {"type": "q4_k_m"}, ()),
    "odd widths": ({"hidden_size": 96, "num_attention_heads": 6}, {"type": "q4_k_m"}, ()),
    "tied, float32, some left": (
        {"tie_word_embeddings": True, "dtype": torch.float32}, {"ignore": ["*.down_proj"]}, (),
    ),
    "no dtype, float32, some left": ({"dtype": torch.float32}, {"ignore": ["*.down_proj"]}, ()),
    "float16 and overrides": ({"dtype": torch.float16}, {"overrides": {"*.q_proj": {"type": "q4_0"}}}, ()),
    "gemma3": ({"family": "gemma3_text", "query_pre_attn_scalar": 16}, {}, ()),
    "qwen2": ({"family": "qwen2"}, {}, ()),
    "phi3": ({"family": "phi3"}, {}, ()),
    "rotary factors": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 64}}, {}, (),
    ),
    "pruned": ({}, {}, ({"kind": "prune", "shape": {"intermediate_size": 64, "num_hidden_layers": 1}},)),
    "imatrix": ({}, {"method": "gptq", "imatrix": True, "type": "q4_0"}, ()),
}  # fmt: skip


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("split", ["100kB", None])
@pytest.mark.parametrize("name", OTHERS)
def test_files_are_planned_to_the_byte(name: str, split: str | None, folder: Path) -> None:
    config, stage, before = OTHERS[name]
    model = make_model(folder / "model", **{"intermediate_size": 128} | config)
    if name.startswith("no dtype"):
        said = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({key: said[key] for key in said if key != "dtype"}))
    write(folder, model, split, before, **stage)
    expected = planned()
    assert (len(expected) > 1) == (split is not None)
    run()
    assert left(folder) == expected
    found = gguf_of(folder / "out")
    assert found is not None and found.name == next(iter(expected))
    assert (folder / "out" / "tiny.imatrix.gguf").exists() == (name == "imatrix")


def test_a_dry_run_refuses_what_a_run_does(folder: Path, model: Path) -> None:
    other = make_model(folder / "model")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    write(folder, other, "200kB")
    for more in ((), ("--dry-run",)):
        done = run(*more, code=2)
        assert f"error: stages.0.format: gguf can't hold this model: {other}: " in done.stderr
    assert not (folder / "out").exists() and not (folder / ".dscompress").exists()


@pytest.mark.parametrize("split", ["big", "0"])
def test_what_is_no_size_is_refused(split: str, folder: Path, model: Path) -> None:
    write(folder, model, split)
    assert f"stages.0.split: '{split}' is not a size; write one such as 4GB" in run(code=2).stderr


@pytest.mark.parametrize(
    ("names", "given", "found"),
    [
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "a-00001-of-00003.gguf"], 1, 2),
        (["[a]-00001-of-00002.gguf", "[a]-00002-of-00002.gguf", "a-00002-of-00002.gguf"], 0, 2),
        (["a.gguf", "b.gguf"], 0, 1),
    ],
)
def test_parts_are_known_by_their_names(names: list[str], given: int, found: int, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    assert parts_of(tmp_path / names[given]) == [tmp_path / name for name in names[:found]]
    assert gguf_of(tmp_path) is None
    (tmp_path / names[2 if len(names) > 2 else 1]).unlink()
    assert gguf_of(tmp_path) == tmp_path / names[0]
