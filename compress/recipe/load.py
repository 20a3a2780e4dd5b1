"""From a recipe's name or path to a checked Recipe: bundled files, `--set`, paths made absolute, files that exist.

What is written in a file is relative to that file's folder; what is typed as an option, and what a bundled recipe
says, is relative to the current folder. A Recipe that comes from here holds absolute paths only. `calibration`,
`evaluate.text` and a stage's `data` stay the name of a bundled spec, or become the path of a file that has been found
(and, if it is a spec, checked).

Left out: whether a hub id exists, and what is inside model and text files. That is found where they are read.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from compress.errors import RecipeError
from compress.recipe.document import Document, Place
from compress.recipe.messages import Location, did_you_mean, nearest, shown_path, shown_value
from compress.recipe.schema import Recipe, bundled_dir
from compress.recipe.text import LOCAL_SUFFIXES, CalibrationSpec, SourceSpec, TrainingText, is_local_source
from compress.recipe.train import BASE, Data

YAML_SUFFIXES = (".yaml", ".yml")
LOCAL_TYPES = f"{', '.join(LOCAL_SUFFIXES)}, each also .gz"
COMMAND_LINE = 1 << 31
_LONGEST_NAME, _LONGEST_PATH = 240, 3900  # a little less than systems allow: what is written has names of its own
_SpecT = TypeVar("_SpecT", bound=SourceSpec)
DEFAULT_CALIBRATION = str(Recipe.model_fields["calibration"].default)


def load_recipe(
    reference: str | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | None = None,
    point: Sequence[str] = (),
    typed: bool = True,
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        reference: path of a YAML file, or the name of a bundled recipe with or without `.yaml`; or its keys and values,
            whose relative paths start at the current folder.
        overrides: `path=value` assignments such as `stages.0.bits=3`, applied in order.
        model: replaces the recipe's `model`.
        output: replaces the recipe's `output`.
        point: assignments that make the recipe a point of a sweep, which it then has no more.
        typed: whether they come from the command line; else from the recipe's `sweep`, where its own paths start.

    Raises:
        RecipeError: every problem found, a line each.
    """
    if isinstance(reference, str):
        path = _find_recipe(reference)
        bundled = path.parent.resolve() == bundled_dir("recipes").resolve()
        document = Document.read(path, Path.cwd() if bundled else path.parent)
    else:
        document = Document.of(reference)
    written = None if typed or not point else document.place(("sweep",)).folder
    for option, assignment in [*(("--set", each) for each in overrides), *(("sweep", each) for each in point)]:
        if re.match(r"\s*calibration\s*[.\[]", assignment):
            _write_out_calibration(document)
        document.override(assignment, option, written if option == "sweep" else None)
    if point:
        document.data.pop("sweep", None)
    for key, value in (("model", model), ("output", output)):
        if value is not None:
            document.put(key, value, Place(COMMAND_LINE, f"--{key}", Path.cwd()))
    locations = [("model",), *_teachers_and_students(document)]
    _resolve_output(document, [(str(each[-1]), _resolve_model(document, each)) for each in locations])
    _resolve_spec(document, ("calibration",), may_be_text=False)
    _resolve_source(document, ("calibration", "source"))
    for location in _items(document, ("evaluate", "text")):
        _resolve_spec(document, location, may_be_text=True)
    _resolve_data(document)
    for location in [("serve",), *_items(document, ("export",))]:
        _resolve_interpreter(document, (*location, "python"))
    if files := _text_at(document, place := ("evaluate", "task_files")):
        document.replace(place, str(_absolute(files, document.place(place).folder)))
    return document.validate(Recipe)


def load_calibration_spec(reference: str, *, base: Path) -> CalibrationSpec:
    """Reads and checks a spec of calibration text; a relative `source` in it starts at the spec's own folder.

    Args:
        reference: name of a bundled spec (`general_en`), or path of a YAML file.
        base: folder that a relative path starts at.

    Raises:
        RecipeError: there is no such spec, or it has mistakes, a line each.
    """
    return _load_spec(reference, base, CalibrationSpec)


def _load_spec(reference: str, base: Path, schema: type[_SpecT]) -> _SpecT:
    path = _find_spec(reference, base)
    document = Document.read(path)
    _resolve_source(document, ("source",), may_be_folder=schema is TrainingText)
    spec = document.validate(schema)
    return spec if spec.name else spec.model_copy(update={"name": path.stem})


def load_training_texts(data: Data | None, calibration: CalibrationSpec) -> list[TrainingText]:
    """What a stage's `data` means: its texts in order, specs read from their files; relative paths start here.

    Args:
        data: of the stage.
        calibration: the text that null means, with its length. Its `samples`, and those of a spec that is named, are
            how many sequences a calibration takes, and no limit here.

    Raises:
        RecipeError: there is no such spec, or it has mistakes, a line each.
    """
    if data is None:
        return [TrainingText(**calibration.model_dump(exclude={"samples"}, exclude_unset=True))]
    return [
        _load_spec(each, Path.cwd(), TrainingText).model_copy(update={"samples": None})
        if isinstance(each, str)
        else each
        for each in (data if isinstance(data, list) else [data])
    ]


def is_bundled_spec(reference: str) -> bool:
    """Whether a recipe's `calibration` names a spec that comes with dscompress."""
    return _find_spec(reference, Path.cwd()).parent == bundled_dir("calibration")


def load_evaluation_spec(text: str) -> CalibrationSpec:
    """What `evaluate.text` means: a bundled spec, a spec's path, or a text file's; relative paths start here.

    Raises:
        RecipeError: there is no such spec, or it has mistakes, a line each.
    """
    path = Path(text).expanduser()
    if path.suffix not in YAML_SUFFIXES and (is_local_source(text) or path.is_file()):
        return CalibrationSpec(source=text)
    return load_calibration_spec(text, base=Path())


def list_recipes() -> list[tuple[str, str]]:
    """Name and one-line summary (its first comment) of every bundled recipe."""
    return [(name, recipe_text(name).partition("\n")[0].lstrip("# ")) for name in _bundled("recipes")]


def recipe_text(name: str) -> str:
    """The text of a bundled recipe.

    Raises:
        RecipeError: there is none of that name.
    """
    bare, known = _bare(name), _bundled("recipes")
    if bare not in known:
        raise RecipeError([f"{name}: no such bundled recipe{did_you_mean(bare, known)} (there are {', '.join(known)})"])
    return (bundled_dir("recipes") / f"{bare}.yaml").read_text(encoding="utf-8")


def _bundled(kind: Literal["recipes", "calibration"]) -> list[str]:
    return sorted(path.stem for path in bundled_dir(kind).glob("*.yaml"))


def _bare(name: str) -> str:
    return name.removesuffix(".yaml").removesuffix(".yml")


def _find_recipe(reference: str) -> Path:
    path, known = _absolute(reference, Path.cwd()), _bundled("recipes")
    kind = _kind(path)
    if kind == "file":
        return path
    if _bare(reference) in known:
        return bundled_dir("recipes") / f"{_bare(reference)}.yaml"
    if kind == "folder":
        raise RecipeError([f"{reference}: is a folder; name a recipe, which is a .yaml file"])
    guess = _guess_file(path) or did_you_mean(_bare(path.name), known)
    raise RecipeError([f"{reference}: no such recipe{guess} (bundled: {', '.join(known)})"])


def _find_spec(reference: str, base: Path) -> Path:
    path, known = _absolute(reference, base), _bundled("calibration")
    is_yaml = reference.lower().endswith(YAML_SUFFIXES)
    kind = _kind(path) if is_yaml or "/" in reference else None
    if kind == "file" and is_yaml:
        return path
    if _bare(reference) in known:
        return bundled_dir("calibration") / f"{_bare(reference)}.yaml"
    if kind == "folder":
        raise RecipeError([f"{reference}: is a folder; name a .yaml spec in it"])
    if kind or (is_local_source(reference) and not is_yaml):
        raise RecipeError([f"{reference}: is not a .yaml spec; to use a text file, write {{source: {reference}}}"])
    guess = (_guess_file(path) if is_yaml else "") or did_you_mean(_bare(path.name), known)
    raise RecipeError([f"{reference}: no such spec{guess} (bundled: {', '.join(known)})"])


def _write_out_calibration(document: Document) -> None:
    """Turns the name of a spec into its keys, so that `--set calibration.samples=32` has something to change."""
    place, reference = document.place(("calibration",)), document.data.get("calibration", DEFAULT_CALIBRATION)
    if isinstance(reference, str):
        try:
            spec = load_calibration_spec(reference.strip(), base=place.folder)
        except RecipeError as error:
            document.problems.extend((place.line, f"{place.label}: calibration: {text}") for text in error.problems)
            document.raise_problems()
        else:
            document.put("calibration", spec.model_dump(exclude_unset=True), place)


def _resolve_model(document: Document, location: Location) -> Path | None:
    """Makes a local model absolute and returns it; a hub id and a file of a package stay what they are."""
    model = _text_at(document, location)
    if model is None or _is_too_long(document, location, Path(model)) or model.startswith("package:"):
        return None
    path = _absolute(model, document.place(location).folder)
    kind = _kind(path)
    if kind:
        document.replace(location, str(path))
        return path
    if model.startswith(("/", "~", "./", "../")) or model in (".", "..") or model.lower().endswith(".gguf"):
        document.add_problem(location, f"{model}: no such file or folder{_guess_file(path)}")
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        message = "is not a model; write a hub id (org/name), a folder, a .gguf file or package:NAME/FILE.gguf"
        document.add_problem(location, f"{shown_value(model)} {message}")
    return None


def _resolve_output(document: Document, models: Sequence[tuple[str, Path | None]]) -> None:
    """Makes `output` absolute; it must not be, hold or lie in one of the models, each with the key that names it."""
    output = _text_at(document, ("output",))
    if output is None:
        return
    path = _absolute(output, document.place(("output",)).folder)
    document.replace(("output",), str(path))
    if _kind(path) == "file":
        document.add_problem(("output",), f"{output}: is a file; name a folder that the result may take")
    _is_too_long(document, ("output",), path)
    for key, model in models:
        if model is None:
            continue
        real, real_model = Path(os.path.realpath(path)), Path(os.path.realpath(model))
        if real == real_model or real_model in real.parents:
            where = "is" if real == real_model else "lies inside"
            document.add_problem(("output",), f"{output}: {where} the {key} folder; name another folder")
        elif real in real_model.parents:
            document.add_problem(("output",), f"{output}: holds the {key} {shown_path(model)}; name another folder")


def _trained(document: Document) -> Iterator[Location]:
    """Where the recipe says how to train: its training stages, and the `heal` of the others."""
    stages = document.data.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, dict):
            trains = stage.get("kind") in ("finetune", "distill")
            yield ("stages", number) if trains else ("stages", number, "heal")


def _teachers_and_students(document: Document) -> list[Location]:
    """Where other models than the recipe's own are named."""
    named: list[Location] = [(*where, key) for where in _trained(document) for key in ("teacher", "student")]
    return [location for location in named if _text_at(document, location) != BASE]


def _resolve_data(document: Document) -> None:
    """Checks the texts to train on, one or several for each stage, and makes their paths absolute."""
    for where in _trained(document):
        for location in _items(document, (*where, "data")):
            _resolve_spec(document, location, may_be_text=False, schema=TrainingText)
            _resolve_source(document, (*location, "source"), may_be_folder=True)


def _items(document: Document, location: Location) -> list[Location]:
    """Where the items of a list are, or the one value that stands in its place."""
    value = _value_at(document, location)
    return [(*location, number) for number in range(len(value))] if isinstance(value, list) else [location]


def _resolve_spec(
    document: Document, location: Location, *, may_be_text: bool, schema: type[SourceSpec] = CalibrationSpec
) -> None:
    """Checks a spec that is named, and makes its path absolute; with `may_be_text`, a text file's too."""
    reference = _text_at(document, location)
    if reference is None:
        return
    place = document.place(location)
    path = _absolute(reference, place.folder)
    is_yaml = reference.lower().endswith(YAML_SUFFIXES)
    if may_be_text and not is_yaml and (is_local_source(reference) or _kind(path) == "file"):
        _resolve_source(document, location)
        return
    try:
        path = _find_spec(reference, place.folder)
    except RecipeError as error:
        is_id = not (may_be_text or is_yaml or is_local_source(reference)) and re.fullmatch(
            r"[\w.-]+/[\w.-]+", reference
        )
        hint = f"; for a dataset of the hub write {{source: {reference}}}" if is_id else ""
        message = f"{error}{hint}"
        if schema is TrainingText and _kind(path) == "folder":
            message = f"{reference}: is a folder; to train on its files, write {{source: {reference}}}"
        document.add_problem(location, message)
        return
    if path.parent == bundled_dir("calibration"):
        document.replace(location, path.stem)
    else:
        document.replace(location, str(path))
    try:
        _load_spec(str(path), place.folder, schema)
    except RecipeError as error:
        document.problems.extend((place.line, problem) for problem in error.problems)


def _resolve_source(document: Document, location: Location, *, may_be_folder: bool = False) -> None:
    """Makes the path of a text file, or a folder of them, absolute; the id of a hub dataset stays what it is."""
    source = _text_at(document, location)
    if source is None:
        return
    path = _absolute(source, document.place(location).folder)
    kind = _kind(path)
    if kind != "file" and not is_local_source(source) and not (kind and may_be_folder):
        return
    if kind == "folder" and may_be_folder:
        document.replace(location, str(path))
        if _value_at(document, (*location[:-1], "sha256")) is not None:
            document.add_problem((*location[:-1], "sha256"), "is of one file, and source is a folder; remove it")
    elif kind is None:
        document.add_problem(location, f"{source}: no such file{_guess_file(path)}")
    elif kind == "folder":
        document.add_problem(location, f"{source}: is a folder; name one file in it")
    elif not path.name.lower().removesuffix(".gz").endswith(LOCAL_SUFFIXES):
        document.add_problem(location, f"{source}: is not of a type that is read; use {LOCAL_TYPES}")
    else:
        document.replace(location, str(path))


def _resolve_interpreter(document: Document, location: Location) -> None:
    """Makes the path of a Python absolute; a link is kept, since an environment's Python is one."""
    python = _text_at(document, location)
    if python is None:
        return
    path = _absolute(python, document.place(location).folder)
    document.replace(location, str(path))
    if _kind(path) != "file" or not os.access(path, os.X_OK):
        there = "is no program" if _kind(path) else f"no such file{_guess_file(path)}"
        other = "use serve: true" if location[0] == "serve" else "leave it out"
        document.add_problem(location, f"{python}: {there}; name an environment's bin/python, or {other}")


def _value_at(document: Document, location: Location) -> Any:
    """What stands at `location`; None where nothing does."""
    value: Any = document.data
    for part in location:
        held = isinstance(value, dict) or (isinstance(value, list) and isinstance(part, int) and part < len(value))
        value = (value.get(part) if isinstance(value, dict) else value[part]) if held else None
    return value


def _text_at(document: Document, location: Location) -> str | None:
    """The text at `location`; None where there is something else, which validation reports."""
    value = _value_at(document, location)
    return (value.strip() or None) if isinstance(value, str) and "\0" not in value else None


def _absolute(text: str, folder: Path) -> Path:
    """An absolute path. `..` is folded, links are kept: a cached .gguf is a link to a file without that suffix."""
    path = Path(text)
    if text.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user: a path that does not exist
            path = path.expanduser()
    return Path(os.path.normpath(Path.cwd() / folder / path))


def _kind(path: Path) -> Literal["file", "folder"] | None:
    try:
        return "folder" if stat.S_ISDIR(path.stat().st_mode) else "file"
    except (OSError, ValueError):
        return None


def _is_too_long(document: Document, location: Location, path: Path) -> bool:
    """Whether no system has such a path, which is then a problem of the value at `location`."""
    names = [len(os.fsencode(part)) for part in path.parts]
    too_long = max(names, default=0) > _LONGEST_NAME or sum(names) + len(names) > _LONGEST_PATH
    if too_long:
        message = f"is too long; a name in a path can have {_LONGEST_NAME} bytes, the path {_LONGEST_PATH:,}"
        document.add_problem(location, f"{shown_value(str(path))} {message}")
    return too_long


def _guess_file(path: Path) -> str:
    """`; did you mean X?` with a file beside `path`, or the part of the path that is missing."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return f"; the folder {shown_path(path.parent)} is not there"
    guess = nearest(path.name, beside)
    return f"; did you mean {shown_path(path.with_name(guess))}?" if guess else ""
