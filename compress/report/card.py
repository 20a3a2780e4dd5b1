"""The model card: what the hub is told in its front matter, and what people read of how a checkpoint came to be."""

import re
from typing import Any

import yaml

from compress.records import Report, Stage
from compress.report import chain, figures, serving, training
from compress.report.paths import is_here, without_folders

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def view(report: Report) -> dict[str, Any]:
    """What the card's template reads beside the report's figures.

    `base_model` is stated only for what looks like a hub id (`owner/name`) and is no folder here.
    """
    origin = _origin(report)
    hub_base = _HUB_ID.fullmatch(origin) is not None and not is_here(origin)
    stage = figures.quantized_stage(report)
    return {
        "front_matter": as_yaml(_front_matter(report, stage, origin if hub_base else None)),
        "method_words": _card_words(report, stage),
        "hub_base": hub_base,
        "base_name": without_folders(origin),
        "teachers": training.teachers_of(report),
        "texts": training.texts_of(report),
        "recipe_yaml": as_yaml(without_folders(report.recipe)),
        "path": serving.path_of(report),
        "packages": serving.packages(report),
        "servers": [way for way in serving.ways(report) if way.name != "transformers"],
    }


def as_yaml(value: dict[str, Any]) -> str:
    """Keys in their order, as a recipe is written."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text


def _origin(report: Report) -> str:
    """The model whose weights these come from: the recipe's, or the student that a distill stage put in its place."""
    students = [stage.spec.get("student") for stage in report.stages if stage.kind == "distill"]
    return next((str(name) for name in reversed(students) if name), report.base.model)


def _front_matter(report: Report, stage: Stage | None, hub_id: str | None) -> dict[str, Any]:
    spec = stage.spec if stage else {}
    tags = ["dscompress", report.compressed.format, spec.get("method"), *_tags(report)]
    named = [spec[key] for key in ("dtype", "type") if key in spec]
    tags += [export.to for export in report.exports if export.failure is None]
    tags += named or ([f"{spec['bits']}-bit"] if "bits" in spec else [])
    relation = "quantized" if stage is not None else "finetune"
    base = {"base_model": hub_id, "base_model_relation": relation} if hub_id else {}
    return base | {
        "library_name": "transformers" if report.compressed.file is None else "gguf",
        "pipeline_tag": "text-generation",
        **({"quantized_by": "dscompress"} if stage is not None else {}),
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
    }


def _tags(report: Report) -> list[str]:
    return ["pruned" if each == "sparse" else each for each in chain.roles(report)]


def _card_words(report: Report, stage: Stage | None) -> str:
    """What the checkpoint is, on its card: A 4-bit GPTQ quantization of a pruned, healed and distilled version."""
    *others, last = [*chain.roles(report)] or [""]
    how = f"{', '.join(others)} and {last}" if others else last
    if stage is None:
        return f"A {how} version" if how else _method_words(stage)
    return f"{_method_words(stage)} of a {how} version" if how else _method_words(stage)


def _method_words(stage: Stage | None) -> str:
    if stage is not None and "dtype" in stage.spec:
        dtype, method = stage.spec["dtype"].upper(), stage.spec.get("method")
        how = {"auto": "static or dynamic", None: ""}.get(method, str(method))
        what = (
            "activations to INT8 and weights to 4 bits"
            if stage.spec.get("bits") == 4
            else f"weights and activations to {dtype}"
        )
        return f"A quantization of {what} ({how} activation scales)"
    if stage is not None and "type" in stage.spec:
        return f"A {stage.spec['type'].upper()} GGUF quantization"
    if stage is None or "bits" not in stage.spec:
        return "A compressed version"
    return f"A {stage.spec['bits']}-bit {str(stage.spec.get('method', '')).upper()} quantization".replace("  ", " ")
