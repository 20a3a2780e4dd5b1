"""The exact lines that mistakes in recipes get."""

from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress.recipe.load import load_calibration_spec, load_recipe

BASE = "name: a\nmodel: org/m\noutput: out\nstages:\n  - kind: quantize\n"
FOLDER = Path(__file__).parent.parent.parent / "recipes"
RECIPES = f"(bundled: {', '.join(sorted(file.stem for file in FOLDER.glob('*.yaml')))})"
SPECS = "(bundled: chat_en, general_en, general_en_small, wikitext2)"
KINDS = "distill, finetune, prune or quantize"
KEYS = "name, model, revision, trust_remote_code, calibration, stages, evaluate, serve, export, tracker, sweep, output"
WHOLE = "is not a whole number; write one such as 128, 64k, 20M or 1B"
FORM = 'is not path=value, such as stages.0.bits=3; write a part that has dots as ["*.down_proj"]'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(text: str | bytes, *overrides: str, **options: Any) -> list[str]:
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", overrides=overrides, **options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


# The file


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "r.yaml: is empty; write lines of key: value"),
        ("# only a comment\n", "r.yaml: is empty; write lines of key: value"),
        ("- 3\n", "r.yaml:1: a list is not a mapping; write lines of key: value"),
        ("\nhello\n", "r.yaml:2: 'hello' is not a mapping; write lines of key: value"),
        (b"name: a\nmodel: \xff\n", "r.yaml:2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: holds more than one YAML document; keep one (remove the --- between them)"),
        ("a: &x [*x]\n", "r.yaml:1: its aliases (*) stand for themselves or for too much; write the values out"),
        ("a: 1\nb: !thing 3\n", "r.yaml:2: not YAML: could not determine a constructor for the tag '!thing'"),
        ("a: !!int b\n", "r.yaml:1: not YAML: 'b' is not what its tag says"),
        ("{a: b}: c\n", "r.yaml:1: not YAML: a key must be text"),
        ("a: \x01\n", "r.yaml:1: not YAML: control characters are not allowed"),
    ],
)
def test_files_that_hold_no_recipe(text: str | bytes, line: str) -> None:
    assert problems(text) == [line]


@pytest.mark.parametrize(
    ("text", "start", "remedy"),
    [
        ("a: 1\nb: c: d\n", "r.yaml:2: not YAML: ", "check the indentation, and put text that has a colon in quotes"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: not YAML: ", "indent with spaces (no tabs)"),
        ("a: [*.down]\n", "r.yaml:1: not YAML: ", 'text that starts with * or & needs quotes, such as "*.down_proj"'),
        ("a: 1\nb: [x\nc: 2\n", "r.yaml:3: not YAML: ", "flow sequence of line 2"),
    ],
)
def test_syntax_errors_say_the_line_and_a_remedy(text: str, start: str, remedy: str) -> None:
    (line,) = problems(text)
    assert line.startswith(start)
    assert remedy in line


def test_keys_written_twice_are_said_with_the_other_problems() -> None:
    assert problems(BASE + "    bits: 4\n    bits: 5\nname: b\n") == [
        "r.yaml:7: stages.0.bits: is set already by r.yaml:6; keep one",
        "r.yaml:7: stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8",
        "r.yaml:8: name: is set already by r.yaml:1; keep one",
    ]


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        ("quickstat", f"quickstat: no such recipe; did you mean quickstart? {RECIPES}"),
        ("8b_int4_gtpq.yaml", f"8b_int4_gtpq.yaml: no such recipe; did you mean 8b_int4_gptq? {RECIPES}"),
        ("sub/mine.yml", f"sub/mine.yml: no such recipe; did you mean sub/mine.yaml? {RECIPES}"),
        ("zzz", f"zzz: no such recipe {RECIPES}"),
        ("nope/mine.yaml", f"nope/mine.yaml: no such recipe; the folder nope is not there {RECIPES}"),
        ("sub", "sub: is a folder; name a recipe, which is a .yaml file"),
        ("x" * 5000, f"{'x' * 5000}: no such recipe {RECIPES}"),
    ],
)
def test_recipes_that_are_not_there(folder: Path, reference: str, line: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "mine.yaml").touch()
    with pytest.raises(RecipeError) as caught:
        load_recipe(reference)
    assert str(caught.value) == line


def test_unreadable_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r.yaml").touch()

    def refuse(path: Path, *_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # a mode is no obstacle where tests run as root
    with pytest.raises(RecipeError, match=r"^r.yaml: can't be read: Permission denied$"):
        load_recipe("r.yaml")


# Keys and values


def test_all_problems_of_a_recipe_at_once() -> None:
    text = BASE + (
        "    bits: 5\n    group_size: 100\n    bitz: 3\n    method: GPTQ\n    damp: 0\n"
        "evalute: {}\nevaluate: {windows: 0, sequence_length: 12q, text: wikitxt2, prompts: hi}\n"
    )
    assert problems(text) == [
        "r.yaml:6: stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8",
        "r.yaml:7: stages.0.group_size: 100 is not allowed; use -1, 32, 64 or 128",
        "r.yaml:8: stages.0.bitz: unknown key; did you mean bits?",
        "r.yaml:9: stages.0.method: 'GPTQ' is not allowed; use gptq, rtn, dynamic, static or auto (did you mean gptq?)",
        "r.yaml:10: stages.0.damp: 0 is not allowed; use a number above 0",
        "r.yaml:11: evalute: unknown key; did you mean evaluate?",
        f"r.yaml:12: evaluate.text: wikitxt2: no such spec; did you mean wikitext2? {SPECS}",
        f"r.yaml:12: evaluate.sequence_length: '12q' {WHOLE}",
        "r.yaml:12: evaluate.windows: 0 is not allowed; use 1 or more",
        "r.yaml:12: evaluate.prompts: 'hi' is not a list; write [a, b], or a line with a dash for each item",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("revision: 12345", 'revision: 12345 is not text; put it in quotes: "12345"'),
        ("trust_remote_code: 'yes'", "trust_remote_code: 'yes' is not allowed; use true or false"),
        ("qqqqqq: 1", f"qqqqqq: unknown key; use {KEYS}"),
        ("? 7\n: 1", f"7: unknown key; use {KEYS}"),
        ("<<: {name: b}", f'["<<"]: unknown key; use {KEYS}'),
        ("evaluate: 4", "evaluate: 4 is not a mapping; write lines of key: value"),
        ("evaluate: {prompts: [hi, 3]}", 'evaluate.prompts.1: 3 is not text; put it in quotes: "3"'),
        ("evaluate: {sequence_length: 1}", "evaluate.sequence_length: 1 is not allowed; use 2 or more"),
        ("evaluate: {windows: true}", f"evaluate.windows: true {WHOLE}"),
        ("evaluate: {windows: 2.5}", f"evaluate.windows: 2.5 {WHOLE}"),
        ("evaluate: {text: t.txt}", "evaluate.text: t.txt: no such file"),
        ("evaluate: {text: sub}", f"evaluate.text: sub: no such spec {SPECS}"),
        ("evaluate: {text: ./sub}", "evaluate.text: ./sub: is a folder; name one file in it"),
        ("evaluate: {text: notes.md}", "evaluate.text: notes.md: is not of a type that is read; use .jsonl, .json, "),
        ("calibration:", "calibration: an empty value is not allowed; write text"),
        ("calibration: [a]", "calibration: a list is not allowed; write text"),
        ("calibration: general_enn", f"calibration: general_enn: no such spec; did you mean general_en? {SPECS}"),
        ("calibration: sub/s.yaml", f"calibration: sub/s.yaml: no such spec; did you mean sub/s.yml? {SPECS}"),
        (
            "calibration: t.jsonl",
            "calibration: t.jsonl: is not a .yaml spec; to use a text file, write {source: t.jsonl}",
        ),
        ("calibration: allenai/c4", f"calibration: allenai/c4: no such spec {SPECS}; for a dataset of the hub write "),
        ("calibration: {samples: 3}", "calibration.source: is missing; add it. A hub dataset (allenai/c4) or a local "),
        ("calibration: {source: 3}", 'calibration.source: 3 is not text; put it in quotes: "3"'),
        ("calibration: {source: nte.txt}", "calibration.source: nte.txt: no such file; did you mean note.txt?"),
        ("calibration: {source: a/b, seed: -1}", "calibration.seed: -1 is not allowed; use 0 or more"),
        ("calibration: {source: a/b, sample: 1}", "calibration.sample: unknown key; did you mean samples?"),
        ("calibration: {source: a/b, sha256: abc}", "calibration.sha256: 'abc' is not a checksum; write the 64 "),
        (
            f"calibration: {{source: a/b, sha256: {'0a' * 32}}}",
            "calibration.sha256: is for a local file; pin a hub dataset with revision instead",
        ),
        (
            "calibration: {source: note.txt, split: test}",
            "calibration.split: is for a hub dataset and source is a local file; remove it",
        ),
    ],
)
def test_each_key(folder: Path, line: str, problem: str) -> None:
    (folder / "sub").mkdir()
    for name in ("sub/s.yml", "note.txt", "notes.md"):
        (folder / name).touch()
    (found,) = problems(f"{BASE}{line}\n")
    assert found.startswith(f"r.yaml:6: {problem}")


def test_values_of_a_stage() -> None:
    text = BASE + (
        "    symmetric: 3\n    damp: [1]\n    clip: 3\n    overrides: {'': {bits: 4}, a.b: {}, c: 3, d: {bits: 5}}\n"
        "    ignore: ['', a.b, 3]\n    embeddings: yes\n    format: gptq\n"
    )
    assert problems(text) == [
        "r.yaml:6: stages.0.symmetric: 3 is not allowed; use true or false",
        "r.yaml:7: stages.0.damp: a list is not a number; write one such as 0.01",
        "r.yaml:8: stages.0.clip: 3 is not allowed; use none, mse or hessian",
        'r.yaml:9: stages.0.overrides[""]: is empty; write some text',
        'r.yaml:9: stages.0.overrides["a.b"]: changes nothing; give it bits, group_size or symmetric, or remove it',
        "r.yaml:9: stages.0.overrides.c: 3 is not a mapping; write lines of key: value (bits, group_size, symmetric)",
        "r.yaml:9: stages.0.overrides.d.bits: 5 is not allowed; use 2, 3, 4 or 8",
        "r.yaml:10: stages.0.ignore.0: is empty; write some text",
        'r.yaml:10: stages.0.ignore.2: 3 is not text; put it in quotes: "3"',
        "r.yaml:12: stages.0.format: gptq can't hold quantized embeddings; use compressed-tensors or embeddings: false",
    ]


@pytest.mark.parametrize(
    ("damp", "problem"),
    [
        ("1.5", "1.5 is not allowed; use 1 or less"),
        ("-1e-3", "-0.001 is not allowed; use a number above 0"),
        (".nan", "nan is not a number; write one such as 0.01"),
        ("little", "'little' is not a number; write one such as 0.01"),
        ("true", "true is not a number; write one such as 0.01"),
    ],
)
def test_damp(damp: str, problem: str) -> None:
    assert problems(f"{BASE}    damp: {damp}\n") == [f"r.yaml:6: stages.0.damp: {problem}"]


def test_a_glob_that_is_ignored_and_overridden() -> None:
    text = BASE + '    overrides: {"*.down": {bits: 8}, "{x}": {bits: 8}}\n    ignore: ["*.down", "{x}"]\n'
    assert problems(text) == [
        "r.yaml:7: stages.0.ignore: holds *.down, {x}, which overrides has too; keep one of the two"
    ]


def test_kinds_of_stages() -> None:
    text = "name: a\nmodel: m\noutput: o\nstages:\n- kind: distil\n  alpha: 3\n- bits: 9\n- 4\n- kind: quantise\n"
    lines = problems(text)
    assert lines[:2] + lines[3:] == [
        f"r.yaml:5: stages.0.kind: 'distil' is not allowed; use {KINDS} (did you mean distill?)",
        f"r.yaml:7: stages.1.kind: is missing; add it. What the stage does: {KINDS}.",
        f"r.yaml:9: stages.3.kind: 'quantise' is not allowed; use {KINDS} (did you mean quantize?)",
    ]
    assert lines[2].startswith("r.yaml:8: stages.2: 4 is not a mapping; write lines of key: value")


def test_nothing_follows_quantize() -> None:
    problem = "r.yaml:4: stages: quantize comes once, as the last stage; remove or move the others"
    assert problems(BASE + "  - kind: quantize\n") == [problem]


def test_missing_and_empty_keys() -> None:
    assert problems("stages: []\nname: 3\nmodel:\noutput: '  '\n") == [
        "r.yaml:1: stages: is empty; add at least one item",
        'r.yaml:2: name: 3 is not text; put it in quotes: "3"',
        "r.yaml:3: model: an empty value is not allowed; write text",
        "r.yaml:4: output: is empty; write some text",
    ]
    assert [line.partition(". ")[0] for line in problems("\nname: x\n")] == [
        "r.yaml:2: model: is missing; add it",
        "r.yaml:2: stages: is missing; add it",
        "r.yaml:2: output: is missing; add it",
    ]


EIGHT = "name: a\nmodel: org/m\noutput: out\nstages:\n  - kind: quantize\n    method: static\n"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("dtype: int4", "dtype: 'int4' is not allowed; use int8 or fp8 (did you mean int8?)"),
        ("smoothe: 0.5", "smoothe: unknown key; did you mean smooth?"),
        ("smooth: much", "smooth: 'much' is not a power; use a number from 0 to 1 such as 0.5, auto or null"),
        ("smooth: true", "smooth: true is not a power; use a number from 0 to 1 such as 0.5, auto or null"),
        ("smooth: 1.5", "smooth: 1.5 is not allowed; use 1 or less"),
        ("columns: 128", "columns: unknown key; use kind, method, dtype, bits, group_size, weight_rounding, "),
        ("observer: max", "observer: 'max' is not allowed; use minmax, moving_average, percentile or mse (did you"),
        ("kv_cache: int8", "kv_cache: 'int8' is not allowed; use fp8 or fp8_per_head"),
        ("budget: -1", "budget: -1 is not allowed; use 0 or more"),
        (
            "symmetric: false",
            "symmetric: no runtime loads 8-bit weights with zero points; remove it, or use method: gptq",
        ),
        ("granularity: block", "granularity: block is for dtype: fp8; use channel or tensor"),
        (
            "dtype: fp8\n    granularity: block",
            "granularity: block scales its inputs as the model runs; use method: dynamic",
        ),
        ('overrides: {"*.x": {bits: 4}}', 'overrides["*.x"].method: is missing; add it. dynamic or static, as for'),
        (
            'overrides: {"*.x": {method: dynamic}}\n    ignore: ["*.x"]',
            "ignore: holds *.x, which overrides has too; keep one of the two",
        ),
    ],
)
def test_eight_bits(lines: str, problem: str) -> None:
    found = problems(f"{EIGHT}    {lines}\n")
    assert any(line.partition(": stages.0.")[2].startswith(problem) for line in found), found


def test_keys_of_another_method_are_not_proposed() -> None:
    assert problems(BASE + "    smooth: 0.5\n")[0].startswith("r.yaml:6: stages.0.smooth: unknown key; use kind, ")


# Paths


@pytest.mark.parametrize(
    ("model", "output", "line"),
    [
        ("./nope", "o", "--model: ./nope: no such file or folder"),
        ("models/tini.gguf", "o", "--model: models/tini.gguf: no such file or folder; did you mean models/tiny.gguf?"),
        ("../no/m", "o", "--model: ../no/m: no such file or folder; the folder {parent}/no is not there"),
        (
            "https://hf.co/a/b",
            "o",
            "--model: 'https://hf.co/a/b' is not a model; write a hub id (org/name), a folder, a .gguf file or "
            "package:NAME/FILE.gguf",
        ),
        ("models", "models", "--output: models: is the model folder; name another folder"),
        ("models", "models/new/x", "--output: models/new/x: lies inside the model folder; name another folder"),
        ("models", "link/x", "--output: link/x: lies inside the model folder; name another folder"),
        ("models/tiny.gguf", "models", "--output: models: holds the model models/tiny.gguf; name another folder"),
        ("org/m", "note.txt", "--output: note.txt: is a file; name a folder that the result may take"),
    ],
)
def test_models_and_outputs(folder: Path, model: str, output: str, line: str) -> None:
    (folder / "models").mkdir()
    (folder / "models" / "tiny.gguf").touch()
    (folder / "link").symlink_to("models")
    (folder / "note.txt").touch()
    assert problems(BASE, model=model, output=output) == [line.format(parent=folder.parent)]


def test_problems_of_a_spec_are_said_with_its_own_lines(folder: Path) -> None:
    (folder / "s.yaml").write_text("# text\nsource: none.txt\nsampels: 3\n")
    spec = ["s.yaml:2: source: none.txt: no such file", "s.yaml:3: sampels: unknown key; did you mean samples?"]
    assert problems(BASE + "    bits: 5\ncalibration: s.yaml\n") == [
        "r.yaml:6: stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8",
        *spec,
    ]
    assert problems(BASE + "calibration: s.yaml\n", "calibration.seed=1") == [
        f"r.yaml:6: calibration: {problem}" for problem in spec
    ]
    with pytest.raises(RecipeError) as caught:
        load_calibration_spec("s.yaml", base=folder)
    assert caught.value.problems == spec


# --set


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("stages.0.bits=5", "stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8"),
        ("stages.0.overrides.*.down_proj.bits=9", 'stages.0.overrides["*.down_proj"].bits: 9 is not allowed; use 2, '),
        ('stages.0.overrides["*.up"].bitz=8', 'stages.0.overrides["*.up"].bitz: unknown key; did you mean bits?'),
        ("stages=[{kind: quantize, bits: 5}]", "stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8"),
        ("stages.0.overrides={a: {bits: 8}, a: {bits: 4}}", "stages.0.overrides.a: is set already by --set stages.0."),
        ("stages.1.bits=3", "stages: has no item 1; use stages.0"),
        ("stages.-1.bits=3", "stages: has no item -1; use stages.0"),
        ("stages.bits=3", "stages: has no item bits; use stages.0"),
        ("evaluate.prompts.2=x", "evaluate.prompts: has no item 2; use evaluate.prompts.0 to evaluate.prompts.1"),
        ("stages.0.ignore.0=x", "stages.0.ignore: the list is empty; set the whole of stages.0.ignore"),
        ("name.x=3", "name: 'a' is not a mapping, so it has no x"),
        ("nme=4", "nme: unknown key; did you mean name?"),
        ("output=", "output: an empty value is not allowed; write text"),
        ("evaluate.windows=q", f"evaluate.windows: 'q' {WHOLE}"),
        ("calibration.sampels=3", "calibration.sampels: unknown key; did you mean samples?"),
        ("calibration=nope", f"calibration: nope: no such spec {SPECS}"),
        ("stages.0.ignore=[*.x]", "not YAML: did not find expected alphabetic or numeric character; text that starts "),
        ("foo", FORM),
        ("=3", FORM),
        ("a..b=3", FORM),
        ("a.=3", FORM),
        ("a[b=3", FORM),
        ("a]=3", FORM),
        ("", FORM),
    ],
)
def test_options(option: str, problem: str) -> None:
    (line,) = problems(BASE + "    ignore: []\nevaluate: {prompts: [a, b]}\n", option)
    assert line.startswith(f"--set {option}: {problem}")


def test_options_come_after_the_file() -> None:
    assert problems(BASE + "    bits: 5\n", "name=[a]", model="./x", output="r.yaml") == [
        "r.yaml:6: stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8",
        "--set name=[a]: name: a list is not allowed; write text",
        "--model: ./x: no such file or folder",
        "--output: r.yaml: is a file; name a folder that the result may take",
    ]
