"""A recipe for what `plan` recommends, with its comments: valid, and calibrated like the bundled ones."""

import re
from pathlib import Path

import yaml

from compress.errors import OutputError, UserError
from compress.footprint.recommend import RECIPES, slug
from compress.footprint.records import Advice, Footprint
from compress.recipe.lengths import fitting_length
from compress.system.units import size

_EIGHT = "# The scale of each token's activations is found as the model runs."
_FOUR = "# Columns of a group share a 16-bit scale; what rounding a column costs is made good in the columns after it."
_DATA = "{{source: allenai/c4, subset: en, sequence_length: {length}, seed: {seed}}}"


def recipe_of(found: Footprint, file: Path) -> str:
    """The text of the recipe.

    Args:
        found: with a recommendation that has to be made.
        file: that it is for.

    Raises:
        UserError: there is nothing to make, or no weights to make it of.
    """
    advice = found.advice
    if advice is None:
        raise UserError("--write: needs to know what to fit; give --gpu or --memory too")
    if advice.precision is None or advice.recipe is None:
        raise UserError(f"--write: there is no recipe to write: {advice.text}")
    if found.model.told == "config":
        raise UserError(f"--write: {found.model.name} has a config and no weights; name the model's folder or hub id")
    folder = Path(found.model.name).expanduser()
    model = str(folder.absolute()) if folder.exists() else found.model.name
    length = fitting_length(found.model.positions)
    row = next(row for row in found.rows if row.precision == advice.precision)
    name = slug(found.model.name, advice.precision)
    head = (
        f"# {advice.precision} of {found.model.name}: about {size(row.weights_bytes or 0)} of weights, and "
        f"{size(row.total_bytes or 0)} with {found.context} tokens x {found.batch}.",
        "#",
        f"#   dscompress run {file} --dry-run     sizes and memory, before anything is computed",
        f"#   dscompress run {file}",
        "#",
        f"# Written by dscompress plan for {found.card.name if found.card else ''}, after the recipe {advice.recipe}.",
    )
    lines = [
        *(_one_line(line) for line in head),
        f"name: {_text(name)}",
        f"model: {_text(model)}",
        "# General English. For a model that only writes code, or another language, calibrate on that instead.",
        "calibration: general_en",
        "stages:",
        *_stages(advice, length),
        "# How far the predictions move, and perplexity, on text that the calibration never saw.",
        f"evaluate: {{sequence_length: {length}, windows: 64}}",
        "# The checkpoint, with report.html beside its weights; relative to this file.",
        f"output: {_text(f'outputs/{name}')}",
    ]
    return "\n".join(lines) + "\n"


def write_recipe(found: Footprint, file: Path) -> None:
    """Write it.

    Raises:
        OutputError: the file is there, or can't be written.
    """
    text = recipe_of(found, file)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise OutputError(f"{file}: exists; name another file") from None
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror}); name another file") from error


def _stages(advice: Advice, length: int) -> list[str]:
    """Lines of the stages: those of the bundled recipe, with what is set in them."""
    settings = dict(each.partition("=")[::2] for each in advice.settings)
    if advice.recipe in RECIPES.values():
        more = ", smooth: auto" if advice.precision == "int8" else ""
        stage = f"  - {{kind: quantize, method: dynamic, dtype: {advice.precision}, weight_rounding: gptq{more}}}"
        return [f"  {_EIGHT}", stage]
    pruned = "stages.0.target" in settings
    at = "stages.2" if pruned else "stages.0"
    bits, group = settings.get(f"{at}.bits", "4"), settings.get(f"{at}.group_size", "128")
    form = settings.get(f"{at}.format", "compressed-tensors")
    last = [f"  {_FOUR}", f"  - {{kind: quantize, method: gptq, bits: {bits}, group_size: {group}, format: {form}}}"]
    if not pruned:
        return last
    heal, teach = (_DATA.format(length=length, seed=seed) for seed in (0, 1))
    return [
        "  # A share of the decoder layers' parameters goes; a short training brings the rest back.",
        "  - kind: prune",
        f"    target: {settings['stages.0.target']}",
        f"    axes: {settings['stages.0.axes']}",
        f"    heal: {{loss: kl, tokens: 20M, data: {heal}}}",
        "  # Then it learns from the original.",
        "  - kind: distill",
        "    teacher: base",
        "    tokens: 500M",
        f"    data: {teach}",
        *last,
    ]


def _text(value: str) -> str:
    """A value as YAML writes it in one line, quoted where it must be."""
    return (
        value if re.fullmatch(r"[A-Za-z][\w./:-]*|/[\w./-]*", value) else _one_line(yaml.safe_dump(value, width=9999))
    )


def _one_line(text: str) -> str:
    return " ".join(text.replace("\n...", "").split("\n")).strip()
