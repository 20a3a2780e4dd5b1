"""From a recipe's name or path to a checked Recipe: bundled files, `--set`, paths made absolute, files that exist.

What is written in a file is relative to that file's folder; what is typed as an option, and what a bundled recipe
says, is relative to the current folder. A Recipe that comes from here holds absolute paths only. `calibration` and
`evaluate.text` stay the name of a bundled spec, or become the path of a file that has been found (and, if it is a
spec, checked).

Left out: whether a hub id exists, and what is inside model and text files. That is found where they are read.
"""

import contextlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from compress.errors import RecipeError
from compress.recipe.document import Document, Place
from compress.recipe.messages import Location, did_you_mean, nearest, shown_path, shown_value
from compress.recipe.schema import LOCAL_SUFFIXES, CalibrationSpec, Recipe, bundled_dir, is_local_source

YAML_SUFFIXES = (".yaml", ".yml")
LOCAL_TYPES = f"{', '.join(LOCAL_SUFFIXES)}, each also .gz"
COMMAND_LINE = 1 << 31
_LONGEST_NAME, _LONGEST_PATH = 240, 3900  # a little less than systems allow: what is written has names of its own
DEFAULT_CALIBRATION = str(Recipe.model_fields["calibration"].default)


def load_recipe(
    reference: str | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | None = None,
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        reference: path of a YAML file, or the name of a bundled recipe with or without `.yaml`; or its keys and values,
            whose relative paths start at the current folder.
        overrides: `path=value` assignments such as `stages.0.bits=3`, applied in order.
        model: replaces the recipe's `model`.
        output: replaces the recipe's `output`.

    Raises:
        RecipeError: every problem found, a line each.
    """
    if isinstance(reference, str):
        path = _find_recipe(reference)
        bundled = path.parent.resolve() == bundled_dir("recipes").resolve()
        document = Document.read(path, Path.cwd() if bundled else path.parent)
    else:
        document = Document.of(reference)
    for assignment in overrides:
        if re.match(r"\s*calibration\s*[.\[]", assignment):
            _write_out_calibration(document)
        document.override(assignment)
    for key, value in (("model", model), ("output", output)):
        if value is not None:
            document.put(key, value, Place(COMMAND_LINE, f"--{key}", Path.cwd()))
    _resolve_output(document, _resolve_model(document))
    _resolve_spec(document, ("calibration",), may_be_text=False)
    _resolve_source(document, ("calibration", "source"))
    _resolve_spec(document, ("evaluate", "text"), may_be_text=True)
    return document.validate(Recipe)


def load_calibration_spec(reference: str, *, base: Path) -> CalibrationSpec:
    """Reads and checks a spec of calibration text; a relative `source` in it starts at the spec's own folder.

    Args:
        reference: name of a bundled spec (`general_en`), or path of a YAML file.
        base: folder that a relative path starts at.

    Raises:
        RecipeError: there is no such spec, or it has mistakes, a line each.
    """
    path = _find_spec(reference, base)
    document = Document.read(path)
    _resolve_source(document, ("source",))
    spec = document.validate(CalibrationSpec)
    return spec if spec.name else spec.model_copy(update={"name": path.stem})


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


def _resolve_model(document: Document) -> Path | None:
    """Makes a local `model` absolute and returns it; a hub id and a file of a package stay what they are."""
    model = _text_at(document, ("model",))
    if model is None or _is_too_long(document, "model", Path(model)) or model.startswith("package:"):
        return None
    path = _absolute(model, document.place(("model",)).folder)
    kind = _kind(path)
    if kind:
        document.replace(("model",), str(path))
        return path
    if model.startswith(("/", "~", "./", "../")) or model in (".", "..") or model.lower().endswith(".gguf"):
        document.add_problem(("model",), f"{model}: no such file or folder{_guess_file(path)}")
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        message = "is not a model; write a hub id (org/name), a folder, a .gguf file or package:NAME/FILE.gguf"
        document.add_problem(("model",), f"{shown_value(model)} {message}")
    return None


def _resolve_output(document: Document, model: Path | None) -> None:
    output = _text_at(document, ("output",))
    if output is None:
        return
    path = _absolute(output, document.place(("output",)).folder)
    document.replace(("output",), str(path))
    if _kind(path) == "file":
        document.add_problem(("output",), f"{output}: is a file; name a folder that the result may take")
    _is_too_long(document, "output", path)
    if model is None:
        return
    real, real_model = Path(os.path.realpath(path)), Path(os.path.realpath(model))
    if real == real_model or real_model in real.parents:
        where = "is" if real == real_model else "lies inside"
        document.add_problem(("output",), f"{output}: {where} the model folder; name another folder")
    elif real in real_model.parents:
        document.add_problem(("output",), f"{output}: holds the model {shown_path(model)}; name another folder")


def _resolve_spec(document: Document, location: Location, *, may_be_text: bool) -> None:
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
        is_id = not may_be_text and re.fullmatch(r"[\w.-]+/[\w.-]+", reference) and not is_yaml
        hint = f"; for a dataset of the hub write {{source: {reference}}}" if is_id else ""
        document.add_problem(location, f"{error}{hint}")
        return
    if path.parent == bundled_dir("calibration"):
        document.replace(location, path.stem)
    else:
        document.replace(location, str(path))
    try:
        load_calibration_spec(str(path), base=place.folder)
    except RecipeError as error:
        document.problems.extend((place.line, problem) for problem in error.problems)


def _resolve_source(document: Document, location: Location) -> None:
    """Makes the path of a text file absolute; the id of a hub dataset stays what it is."""
    source = _text_at(document, location)
    if source is None:
        return
    path = _absolute(source, document.place(location).folder)
    kind = _kind(path)
    if kind != "file" and not is_local_source(source):
        return
    if kind is None:
        document.add_problem(location, f"{source}: no such file{_guess_file(path)}")
    elif kind == "folder":
        document.add_problem(location, f"{source}: is a folder; name one file in it")
    elif not path.name.lower().removesuffix(".gz").endswith(LOCAL_SUFFIXES):
        document.add_problem(location, f"{source}: is not of a type that is read; use {LOCAL_TYPES}")
    else:
        document.replace(location, str(path))


def _text_at(document: Document, location: Location) -> str | None:
    """The text at `location`; None where there is something else, which validation reports."""
    value: Any = document.data
    for part in location:
        value = value.get(part) if isinstance(value, dict) else None
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


def _is_too_long(document: Document, key: str, path: Path) -> bool:
    """Whether no system has such a path, which is then a problem of `key`."""
    names = [len(os.fsencode(part)) for part in path.parts]
    too_long = max(names, default=0) > _LONGEST_NAME or sum(names) + len(names) > _LONGEST_PATH
    if too_long:
        message = f"is too long; a name in a path can have {_LONGEST_NAME} bytes, the path {_LONGEST_PATH:,}"
        document.add_problem((key,), f"{shown_value(str(path))} {message}")
    return too_long


def _guess_file(path: Path) -> str:
    """`; did you mean X?` with a file beside `path`, or the part of the path that is missing."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return f"; the folder {shown_path(path.parent)} is not there"
    guess = nearest(path.name, beside)
    return f"; did you mean {shown_path(path.with_name(guess))}?" if guess else ""
