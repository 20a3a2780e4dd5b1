"""What tasks are called, and whether they are there; looked at before anything is computed. Never imports torch.

lm-eval reads thousands of YAML files to learn its names, for seconds. Here their heads are searched; where that does
not find a name, lm-eval is asked before it is refused.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from compress.recipe.messages import did_you_mean
from compress.system.extras import missing_extra

_HEAD = re.compile(r"""^["']?(task|group|tag)["']?:[ \t]*([^#\n]*)[^\n]*((?:\n[ \t]*-[ \t][^\n]*)*)""", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """Reads task files; functions that they name stay unread."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def task_problems(names: Sequence[str], files: Path | None, where: str) -> list[str]:
    """Why these tasks can't be evaluated, a line each; empty where they are known.

    Args:
        names: tasks, groups or tags.
        files: folder of the user's own task files.
        where: the recipe's key, or the option, for the messages.
    """
    missing = missing_extra("lm_eval", "tasks")
    if missing is not None:
        return [f"{where}: {missing}"]
    doubled = {name for name in names if names.count(name) > 1}
    problems = [f"{where}: {name} is there twice; keep one" for name in sorted(doubled)]
    if files is not None and not files.is_dir():
        return [*problems, f"{where}: {files}: no such folder of task files"]
    own = own_tasks(files)
    unknown = [name for name in names if name not in own]
    known = {*own, *(_stock() if unknown else ())}
    if set(unknown) - known:
        known |= set(_lm_eval_names(files))
    return problems + [
        f"{where}: {name} is no task of lm-eval{' or of ' + str(files) if files else ''}"
        f"{did_you_mean(name, known) or '; `lm_eval ls tasks` lists them'}"
        for name in unknown
        if name not in known
    ]


def own_tasks(files: Path | None) -> dict[str, Path]:
    """The tasks and groups that a folder of task files defines, members of groups too, and the file of each."""
    found: dict[str, Path] = {}
    if files is None:
        return found
    for file in sorted(files.rglob("*.yaml")):
        for name in _defined(read_task_file(file)):
            found.setdefault(name, file)
    return found


def read_task_file(file: Path) -> dict[str, Any]:
    """A task file's keys; empty for one that is no mapping or no YAML, as lm-eval passes over it."""
    try:
        content = yaml.load(file.read_bytes(), _Loader)  # noqa: S506 (a safe loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _defined(content: dict[str, Any]) -> Iterator[str]:
    if isinstance(group := content.get("group"), str):
        yield group
    task = content.get("task")
    if isinstance(task, str):
        yield task
    for member in task if isinstance(task, list) else ():
        if isinstance(member, dict) and isinstance(member.get("task"), str):
            yield member["task"]


def folders_of(names: Sequence[str]) -> list[Path] | None:
    """The folders of lm-eval's own files that define these tasks, so that it need not read all thousands of them.

    None where it has to: one of the names is a group or a tag, whose members may lie anywhere, or lies in two places.
    """
    found = [_stock().get(name, set()) for name in names]
    if any(len(places) != 1 or None in places for places in found):
        return None
    return sorted({place for places in found for place in places if place is not None})


@cache
def _stock() -> dict[str, set[Path | None]]:
    """Nearly all names of lm-eval, within a second, and the folders that define them; None among these: no task."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    found: dict[str, set[Path | None]] = defaultdict(set)
    for file in root.rglob("*.yaml"):
        folder = root / file.relative_to(root).parts[0]
        for key, first, rest in _HEAD.findall(file.read_text(encoding="utf-8", errors="replace")):
            several = [*first.strip("[] \t\r").split(","), *rest.splitlines()]
            for each in several:
                name = each.partition(" #")[0].strip(" \t\r-\"'")
                found[name].add(folder if key == "task" and not rest else None)
    return dict(found)


def _lm_eval_names(files: Path | None) -> list[str]:
    from lm_eval.tasks import TaskManager

    names: list[str] = TaskManager(include_path=None if files is None else str(files)).all_tasks
    return names
