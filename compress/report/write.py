"""Writes a report beside the weights: `report.json`, `report.md`, `report.html` and the model card `README.md`.

All four state the same figures (compress/report/figures.py). Each file appears whole or not at all. The page holds its
style and its pictures, and loads nothing.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import jinja2
import yaml

from compress.errors import OutputError
from compress.formats.openers import VLLM_BITS
from compress.records import Report, Stage
from compress.report import figures
from compress.report.figures import speed_words, summary_table
from compress.report.pruning import pruned_views
from compress.system.units import count, size

__all__ = ["speed_words", "summary_table", "write_model_card", "write_report"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json, report.md and report.html into `folder`, which exists.

    Raises:
        OutputError: a file can't be written there.
    """
    from markupsafe import Markup

    from compress.report import plots

    view = _view(report)
    pictures = {
        "size_plot": plots.size_bars(report),
        "layer_plot": plots.error_by_layer(report),
        "window_plot": plots.kl_by_window(report.quality) if report.quality else None,
    }
    safe = {name: Markup(svg) if svg else None for name, svg in pictures.items()}
    environment = _environment()
    css = environment.get_template("report.css").render()
    page = environment.get_template("report.html.jinja").render(view | safe, css=Markup(css))
    _write(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    _write(folder / "report.md", environment.get_template("report.md.jinja").render(view))
    _write(folder / "report.html", page)


def write_model_card(report: Report, folder: Path) -> None:
    """Writes README.md, a Hugging Face model card, into `folder`, which exists.

    `base_model` is stated only for what looks like a hub id (`owner/name`) and is no folder here. vLLM is named for
    what its kernels take: compressed-tensors of 4 or 8 bits without quantized embeddings.

    Raises:
        OutputError: the file can't be written there.
    """
    hub_base = _HUB_ID.fullmatch(report.base.model) is not None and not Path(report.base.model).exists()
    stage = figures.quantized_stage(report)
    bits = {row.module.bits for row in figures.matrices(report)}
    spec = stage.spec if stage else {}
    card = _view(report) | {
        "front_matter": _yaml(_front_matter(report, stage, hub_base)),
        "method_words": _card_words(report, stage),
        "hub_base": hub_base,
        "base_name": _without_folders(report.base.model),
        "recipe_yaml": _yaml(_without_folders(report.recipe)),
        "path": f"path/to/{PurePath(report.compressed.path).name}",
        "vllm": report.compressed.format == "compressed-tensors" and bits <= VLLM_BITS and not spec.get("embeddings"),
    }
    _write(folder / "README.md", _environment().get_template("model_card.md.jinja").render(card))


def _without_folders(value: Any) -> Any:
    """A value of a recipe with absolute paths cut to their names: a card is published, and nobody's folders with it."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _front_matter(report: Report, stage: Stage | None, hub_base: bool) -> dict[str, Any]:
    spec = stage.spec if stage else {}
    tags = ["dscompress", report.compressed.format, spec.get("method")]
    tags += ["pruned"] if any(each.kind == "prune" for each in report.stages) else []
    tags += [spec["dtype"]] if "dtype" in spec else [f"{spec['bits']}-bit"] if "bits" in spec else []
    relation = "quantized" if stage is not None else "finetune"
    base = {"base_model": report.base.model, "base_model_relation": relation} if hub_base else {}
    return base | {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"quantized_by": "dscompress"} if stage is not None else {}),
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
    }


def _card_words(report: Report, stage: Stage | None) -> str:
    """What the checkpoint is, on its card."""
    words = _method_words(stage)
    kinds = [each for each in report.stages if each.kind == "prune"]
    if not kinds:
        return words
    how = "pruned" if any(each.pruned for each in kinds) else "sparse"
    if stage is None:
        return f"A {how} version"
    return f"{words} of a {how} version"


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
    if stage is None or "bits" not in stage.spec:
        return "A compressed version"
    return f"A {stage.spec['bits']}-bit {str(stage.spec.get('method', '')).upper()} quantization".replace("  ", " ")


def _view(report: Report) -> dict[str, Any]:
    """What the templates read."""
    quality = report.quality
    rows = figures.matrices(report)
    fallbacks = [row for row in rows if row.module.fallback]
    perplexity = quality.perplexity if quality else None
    return {
        "report": report,
        "quality": quality,
        "verdict": figures.verdict(report),
        "ratio": figures.ratio(report),
        "verification": figures.verification(report),
        "perplexity_change": figures.change(perplexity.base, perplexity.compressed) if perplexity else "",
        "summary": summary_table(report),
        "matrices": rows,
        "fallbacks": fallbacks,
        "worst": figures.worst(report),
        "size_rows": figures.size_rows(report),
        "pruned": pruned_views(report),
        "quality_rows": figures.quality_rows(report),
        "speed_rows": figures.speed_rows(report),
        "speed_words": speed_words(report),
        "speed_protocol": figures.speed_protocol(report),
        "failures": _failures(report),
        "warnings": _fallback_warning(len(fallbacks), len(rows)) + report.warnings,
        "facts": _facts(report),
        "recipe_yaml": _yaml(report.recipe),
    }


def _failures(report: Report) -> list[str]:
    """Why the checkpoint must not be used."""
    verified = report.verified
    if verified is None or verified.passed:
        return []
    if verified.max_logit_difference is None:
        note = verified.note or "it gave no reason"
        return [f"Verification failed: {verified.loader} can't open it ({note}). Do not use this checkpoint."]
    difference, tolerance = figures.number(verified.max_logit_difference), figures.number(verified.tolerance)
    return [
        f"Verification failed: opened by {verified.loader}, the logits differ by up to {difference} "
        f"(allowed: {tolerance}). Do not use this checkpoint."
    ]


def _fallback_warning(fallbacks: int, matrices: int) -> list[str]:
    if not fallbacks:
        return []
    return [f"{fallbacks} of {matrices} matrices fell back to a simpler method; see the errors by layer."]


def _facts(report: Report) -> list[tuple[str, str]]:
    base, calibration, machine, verified = report.base, report.calibration, report.machine, report.verified
    facts = [("Base model", base.model)]
    if base.fingerprint:
        facts.append(("Base fingerprint", base.fingerprint))
    facts.append(("Checkpoint", report.compressed.path))
    if report.compressed.format:
        facts.append(("Format", report.compressed.format))
    if calibration is not None:
        parts = [calibration.name, calibration.source, calibration.licence]
        amount = f"{calibration.sequences} x {calibration.sequence_length} tokens"
        facts.append(("Calibration", ", ".join(dict.fromkeys([part for part in parts if part] + [amount]))))
        if calibration.sha256:
            facts.append(("Calibration SHA-256", calibration.sha256))
    if verified is not None:
        tolerance = "" if verified.tolerance is None else f" (allowed: {figures.number(verified.tolerance)})"
        difference = f"largest logit difference {figures.number(verified.max_logit_difference)}{tolerance}"
        words = [figures.verification(report), verified.loader, difference, verified.note]
        facts.append(("Verification", ", ".join(word for word in words if word)))
    if machine is not None:
        gpu = f", {machine.gpu}" if machine.gpu else ""
        memory = size(machine.memory_bytes)
        facts.append(("Machine", f"{machine.cpu}, {machine.cores} cores, {memory} memory{gpu}"))
    if report.versions:
        facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    return facts


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("compress.report", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "size": lambda value: "–" if value is None else size(value),
        "count": count,
        "number": figures.number,
        "perplexity": figures.perplexity,
        "percent": figures.percent,
        "precision": figures.precision,
        "interval": figures.interval,
        "duration": figures.duration,
        "spec": figures.spec_words,
        "prose": _prose,
        "cell": lambda text: _prose(text).replace("|", "\\|"),
        "fenced": _fenced,
    }
    environment.filters.update(filters)
    return environment


def _prose(text: str) -> str:
    """Text as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*<>\[\]])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str = "text") -> str:
    """Text as a Markdown code block; its fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _yaml(value: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text


def _write(path: Path, text: str) -> None:
    """`text` under its final name once whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: can't be written ({error.strerror or error}); free the disk or choose another output folder"
        ) from error
