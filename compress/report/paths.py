"""Paths in what a report repeats: a checkpoint is published, and nobody's folders with it."""

from pathlib import Path, PurePath
from typing import Any

from compress.recipe.text import is_local_source


def without_folders(value: Any) -> Any:
    """A value of a recipe with the paths in it cut to their names; hub ids, addresses and prompts stay."""
    if isinstance(value, dict):
        return {key: item if key == "prompts" else without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return PurePath(value).name or value if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    """Whether a text names something here; a relative folder reads like a hub id, so it is looked for."""
    if "/" not in text or "://" in text:
        return False
    return PurePath(text).is_absolute() or is_local_source(text) or is_here(text)


def is_here(text: str) -> bool:
    """Whether a text is the path of something that exists."""
    try:
        return Path(text).exists()
    except OSError:  # too long for a name
        return False
