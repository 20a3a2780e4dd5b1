"""What the mistakes of test_bad_input.py are made with: a folder in which a run works, until something is spoiled."""

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_model import random_weights, split_weights, write_model

RECIPE = """\
name: small
model: model
calibration: {source: text.txt, samples: 2, sequence_length: 32}
evaluate: false
output: out
stages:
  - kind: quantize
    group_size: 32
"""
TEXT = "The old library stood at the corner of two quiet streets, and its door was never locked.\n" * 30
RUN = ["run", "recipe.yaml", "--device", "cpu"]


class Desk:
    """A folder with everything that a run needs: model/, text.txt, recipe.yaml."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        write_model(folder / "model")
        self.write("text.txt", TEXT)
        self.write("recipe.yaml", RECIPE)

    def write(self, name: str, content: str | bytes) -> list[str]:
        """Write a file (again); returns the arguments of a run."""
        self.file(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return RUN

    def file(self, name: str) -> Path:
        return self.folder / name

    def recipe(self, old: str, new: str) -> list[str]:
        """Change the recipe."""
        assert old in RECIPE
        return self.write("recipe.yaml", RECIPE.replace(old, new))

    def stage(self, line: str) -> list[str]:
        """Add a line to the stage: line 9 of the recipe."""
        return self.write("recipe.yaml", f"{RECIPE}    {line}\n")

    def eight_bit(self, lines: str, *others: str) -> list[str]:
        """A stage of 8 bits instead: its keys behind kind, from line 8 of the recipe on; then lines outside of it."""
        stage = "".join(f"    {line}\n" for line in lines.split("\n"))
        return self.write("recipe.yaml", RECIPE.replace("    group_size: 32\n", stage) + "".join(others))

    def calibration(self, spec: str) -> list[str]:
        return self.recipe("{source: text.txt, samples: 2, sequence_length: 32}", spec)

    def without(self, *names: str) -> list[str]:
        """Remove files of the model."""
        for name in names:
            self.file(f"model/{name}").unlink()
        return RUN

    def config(self, **changes: Any) -> list[str]:
        """Change config.json."""
        config = json.loads(self.file("model/config.json").read_text())
        return self.write("model/config.json", json.dumps(config | changes))

    def weights(self, **changes: Any) -> list[str]:
        """Replace tensors, by name with __ for a dot. A number goes to [0, 0]; None takes the tensor out."""
        weights = random_weights()
        for name, value in changes.items():
            full = name.replace("__", ".")
            if isinstance(value, float):
                weights[full][0, 0] = value
            elif value is not None:
                weights[full] = value
            else:
                del weights[full]
        shutil.rmtree(self.file("model"))
        write_model(self.file("model"), weights)
        return RUN

    def shards(self) -> Path:
        """Write the model anew, in two shards; returns the index."""
        shutil.rmtree(self.file("model"))
        return split_weights(self.file("model"))

    def index(self, old: str, new: str) -> list[str]:
        """Change the index of a sharded model."""
        index = self.shards()
        text = index.read_text()
        assert old in text
        index.write_text(text.replace(old, new))
        return RUN

    def weight_map(self, text: str) -> list[str]:
        """Replace the index of a sharded model by one with this weight_map."""
        self.shards().write_text(f'{{"weight_map": {text}}}')
        return RUN

    def cut(self, name: str, size: int) -> list[str]:
        """Keep the first bytes of a file, or without the last ones (negative)."""
        return self.write(name, self.file(name).read_bytes()[:size])

    def mount(self, name: str, options: str) -> Path:
        """An empty file system of its own."""
        place = self.file(name)
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
        self.stack.callback(subprocess.run, ["umount", place], check=True)
        return place


@dataclass(frozen=True)
class Case:
    """A mistake.

    Args:
        name: what is wrong, as the table says it.
        arrange: makes the mistake; returns the command's arguments.
        line: what is printed behind "error: "; FOLDER is the current folder, … any text (of a library, or a number).
        code: exit code.
        started: the run gets as far as its work folder.
        mounts: needs a file system of its own.
    """

    name: str
    arrange: Callable[[Desk], list[str]]
    line: str
    code: int = 2
    started: bool = False
    mounts: bool = False
