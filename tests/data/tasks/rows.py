"""Local rows for task files: `load(files={split: name})`."""

from pathlib import Path
from typing import Any

from datasets import Dataset


def load(files: dict[str, str], **_: Any) -> dict[str, Dataset]:
    folder = Path(__file__).parent
    return {split: Dataset.from_json(str(folder / f"{name}.jsonl")) for split, name in files.items()}
