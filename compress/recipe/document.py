"""A YAML file that remembers where each value was written, so that every problem is said with `file:line`.

    document = Document.read(path)             # syntax, encoding, duplicate keys
    document.override("stages.0.bits=3")       # values from the command line, with their own place
    recipe = document.validate(Recipe)         # all problems at once, as one RecipeError

A value's location is a tuple such as ("stages", 0, "bits"), and `places` maps each location to the line or the
option that set it. A problem is one line: place, location, what is wrong, what to do.

Left out: YAML merge keys (`<<`), and keeping comments. Dates stay text: a recipe has none, and a revision may
look like one.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compress.errors import RecipeError
from compress.recipe.messages import (
    Excess,
    Location,
    dotted,
    known_fields,
    nearest,
    shown_path,
    shown_value,
    syntax_message,
    validation_message,
)
from compress.recipe.quantize import Override

ModelT = TypeVar("ModelT", bound=BaseModel)

_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_AFTER_FILE = 1 << 30
# Many times what a long recipe has; what has more is no recipe, and PyYAML would take minutes or crash.
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS, _MOST_DIGITS = 1_000_000, 20_000, 20, 100
_MOST_PROBLEMS = 50
_TOO_DEEP = f"is nested more than {_MOST_LEVELS} levels deep; no key of a recipe is"
_STEP = re.compile(r"""\["([^"]+)"\]|\['([^']+)'\]|\[([^\]"']+)\]|([^.\[\]"'=]+)""")


class Place(NamedTuple):
    """Where a value was written.

    Args:
        line: its line in the file; options come after every line.
        label: what a problem starts with: `recipes/a.yaml:3`, `--set name=x`.
        folder: what a relative path written there is relative to.
    """

    line: int
    label: str
    folder: Path


class Document:
    """The data of a YAML mapping, the place of each value, and the problems found so far.

    Args:
        path: the file, for messages.
        folder: what relative paths inside it are relative to.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        self.data: dict[str, Any] = {}
        self.places: dict[Location, Place] = {}
        self.problems: list[tuple[int, str]] = []
        self._values = 0

    @classmethod
    def read(cls, path: Path, folder: Path | None = None) -> "Document":
        """Reads a YAML mapping; relative paths in it start at `folder`, or else at the file's own.

        Raises:
            RecipeError: the file can't be read, isn't UTF-8, isn't YAML, or isn't a mapping.
        """
        document = cls(path, folder or path.parent)
        text = document._text()
        try:
            root = _compose(text)
            if root is None:
                raise RecipeError([f"{shown_path(path)}: is empty; write lines of key: value"])
            data = document._construct(root, ())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
            raise RecipeError([f"{document._place(line + 1).label}: {syntax_message(error)}"]) from None
        if not isinstance(data, dict):
            message = f"{shown_value(data)} is not a mapping; write lines of key: value"
            raise RecipeError([f"{document.places[()].label}: {message}"])
        document.data = data
        return document

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Document":
        """A document that nobody wrote to a file: a mapping of plain values, all at one place."""
        document = cls(Path("recipe"), Path.cwd())
        document.data = copy.deepcopy(dict(data))
        document._note(document.data, ())
        return document

    def _note(self, value: Any, location: Location) -> None:
        self.places[location] = Place(1, "recipe", self.folder)
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            self._note(child, (*location, key))

    def place(self, location: Location) -> Place:
        """Where the value at `location` was written, or else the nearest enclosing one that was."""
        while location not in self.places:
            location = location[:-1]
        return self.places[location]

    def add_problem(self, location: Location, message: str) -> None:
        """Notes a problem with the value at `location`."""
        place, name = self.place(location), dotted(location)
        prefix = place.label if place.label == f"--{name}" else f"{place.label}: {name}"
        self.problems.append((place.line, f"{prefix}: {message}"))
        if len(self.problems) >= _MOST_PROBLEMS:  # more help nobody, and finding what each one means takes time
            self.raise_problems()

    def raise_problems(self) -> None:
        """Raises every problem noted so far, in the order of the file, if there is any."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: problem[0])
            raise RecipeError(list(dict.fromkeys(text for _, text in ordered)))

    def validate(self, schema: type[ModelT]) -> ModelT:
        """The data as a `schema` object.

        Raises:
            RecipeError: the problems noted before and those of validation, a line each.
        """
        try:
            result = schema.model_validate(self.data)
        except ValidationError as error:
            self._add_errors(schema, error.errors(include_url=False))
            result = None
        self.raise_problems()
        assert result is not None
        return result

    def replace(self, location: Location, value: Any) -> None:
        """Puts `value` in place of the one at `location`, which keeps its place."""
        container: Any = self.data
        for part in location[:-1]:
            container = container[part]
        container[location[-1]] = value

    def put(self, key: str, value: Any, place: Place) -> None:
        """Sets a top-level key, and notes where that was written."""
        self._forget((key,))
        self.places[(key,)] = place
        self.data[key] = value

    def override(self, assignment: str, option: str = "--set", folder: Path | None = None) -> None:
        """Applies one `--set path=value`; the value is YAML. Mistakes are noted as problems of that option.

        Args:
            assignment: path=value.
            option: what problems call it.
            folder: where a relative path in it starts; None: the current one.
        """
        shown = assignment if len(assignment) <= 200 else f"{assignment[:197]}..."
        place = Place(_AFTER_FILE, f"{option} {shown}", folder or Path.cwd())
        try:
            parts, text = split_assignment(assignment)
            if len(parts) > _MOST_LEVELS:
                raise LookupError(_TOO_DEEP)
            container, location = self._open(parts, place)
            node = _compose(text)
            self._forget(location)
            self.places[location] = place
            container[location[-1]] = None if node is None else self._construct(node, location, place)
        except yaml.YAMLError as error:
            self.problems.append((place.line, f"{place.label}: {syntax_message(error)}"))
        except LookupError as error:
            self.problems.append((place.line, f"{place.label}: {error.args[0]}"))

    def _forget(self, location: Location) -> None:
        self.places = {known: at for known, at in self.places.items() if known[: len(location)] != location}

    def _open(self, parts: list[str], place: Place) -> tuple[Any, Location]:
        """The container that holds the value at `parts`, and its location; mappings on the way are made.

        Raises:
            LookupError: a part has no meaning in the list or the scalar that it is asked of.
        """
        container: Any = self.data
        location: Location = (_key(self.data, parts[0], ()),)
        for part in parts[1:]:
            key = location[-1]
            child = container.get(key) if isinstance(container, dict) else container[key]
            if child is None or isinstance(child, bool):  # `evaluate: false`, then --set evaluate.windows=8
                child = container[key] = {}
                self.places.setdefault(location, place)
            container = child
            location = (*location, _key(container, part, location))
        return container, location

    def _place(self, line: int) -> Place:
        return Place(line, f"{shown_path(self.path)}:{line}", self.folder)

    def _text(self) -> str:
        try:
            with self.path.open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise RecipeError([f"{shown_path(self.path)}: can't be read: {error.strerror}"]) from None
        if len(content) > _MOST_BYTES:
            raise RecipeError([f"{shown_path(self.path)}: has more than {_MOST_BYTES:,} bytes; name a YAML file"])
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            label = self._place(content.count(b"\n", 0, error.start) + 1).label
            message = f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
            raise RecipeError([f"{label}: {message}"]) from None

    def _construct(self, node: yaml.Node, location: Location, place: Place | None = None) -> Any:
        """Plain data of a node; notes the place of each value (`place` or else its line) and keys written twice."""
        self._values += 1
        if self._values > _MOST_VALUES or len(location) > _MOST_LEVELS:
            problem = "its aliases (*) stand for themselves or for too much; write the values out"
            raise Excess(problem, node.start_mark)
        self.places.setdefault(location, place or self._place(node.start_mark.line + 1))
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(item, (*location, index), place) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return _scalar(node)
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key_node.start_mark)
            here, earlier = (*location, key_node.value), None
            if key_node.value in data:
                earlier = self.places[here]
                self._forget(here)
            self.places[here] = place or self._place(key_node.start_mark.line + 1)
            if earlier:
                self.add_problem(here, f"is set already by {earlier.label}; keep one")
            data[key_node.value] = self._construct(value_node, here, place)
        return data

    def _add_errors(self, schema: type[BaseModel], errors: list[ErrorDetails]) -> None:
        """Notes pydantic's errors. A stage without a known kind gets only that one: its other keys mean nothing yet."""
        for error in errors:
            if error["type"] == "stage_kind":
                self._add_kind(error)
                continue
            *parents, last = error["loc"]
            location: Location = ()
            for part in parents:  # pydantic's path has the tags of union members too, which nobody wrote
                location = (*location, part) if (*location, part) in self.places else location
            holder = location
            if error["type"] == "missing" or (*location, last) in self.places:
                location = (*location, last)
            wrong_type = error["type"] in ("dict_type", "model_type")
            known = known_fields(schema, location if wrong_type else holder, parents)
            self.add_problem(location, validation_message(error, known))

    def _add_kind(self, error: ErrorDetails) -> None:
        """Notes that a stage has no kind, or none that there is."""
        kind, kinds = error["input"].get("kind"), error["ctx"]["kinds"]
        stage = tuple(error["loc"])
        if "kind" not in error["input"]:
            self.add_problem((*stage, "kind"), f"is missing; add it. What the stage does: {kinds}.")
            return
        guess = nearest(kind, re.split(", | or ", kinds)) if isinstance(kind, str) else None
        hint = f" (did you mean {guess}?)" if guess else ""
        self.add_problem((*stage, "kind"), f"{shown_value(kind)} is not allowed; use {kinds}{hint}")


def split_assignment(assignment: str) -> tuple[list[str], str]:
    """The path and the value of `a.b.0["x.y"]=value`.

    A glob needs no quotes where nothing else could be meant: what stands between `overrides` and a last part that
    names a setting (`overrides.*.down_proj.bits`) is one glob.

    Raises:
        LookupError: it has another form.
    """
    parts: list[str] = []
    position, plain = 0, True
    while step := _STEP.match(assignment, position):
        parts.append(step[4].strip() if step[4] else step[step.lastindex or 0])
        plain = plain and step[4] is not None
        position = step.end()
        following = assignment[position : position + 1]
        if following == "=":
            return _join_glob(parts) if plain else parts, assignment[position + 1 :]
        position += following == "."
        if following not in (".", "["):
            break
    raise LookupError('is not path=value, such as stages.0.bits=3; write a part that has dots as ["*.down_proj"]')


def _join_glob(parts: list[str]) -> list[str]:
    if "overrides" not in parts:
        return parts
    start = parts.index("overrides") + 1
    end = len(parts) - (parts[-1] in Override.model_fields)
    return [*parts[:start], *([".".join(parts[start:end])] if end > start else []), *parts[end:]]


def _key(container: Any, part: str, location: Location) -> str | int:
    """`part` as a key of a mapping, or as the index of an item that a list has."""
    name = dotted(location)
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise LookupError(f"{name}: {shown_value(container)} is not a mapping, so it has no {part}")
    if part.isdecimal() and int(part) < len(container):
        return int(part)
    if not container:
        raise LookupError(f"{name}: the list is empty; set the whole of {name}")
    last = len(container) - 1
    raise LookupError(f"{name}: has no item {part}; use {name}.0" + (f" to {name}.{last}" if last else ""))


def _compose(text: str) -> yaml.Node | None:
    _check_extent(text)
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _check_extent(text: str) -> None:
    """Refuse what is nested too deeply or has too many values, event by event: nothing is built, nothing recurses."""
    depth = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.NodeEvent)
        if depth > _MOST_LEVELS:
            raise Excess(_TOO_DEEP, event.start_mark)
        if values > _MOST_VALUES:
            problem = f"has more than {_MOST_VALUES:,} keys and values; no recipe has"
            raise Excess(problem, event.start_mark)


def _scalar(node: yaml.Node) -> Any:
    number = node.tag.endswith((":int", ":float"))
    if number and len(node.value) > _MOST_DIGITS:
        problem = f"a number has {len(node.value):,} characters; use at most {_MOST_DIGITS}, or put text in quotes"
        raise Excess(problem, node.start_mark)
    if node.tag.endswith(":timestamp") or (number and ":" in node.value):  # 2:4 is no number of base 60
        return node.value
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, LookupError, OverflowError):  # !!int x, !!bool x
        problem = f"{shown_value(node.value)} is not what its tag says"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
