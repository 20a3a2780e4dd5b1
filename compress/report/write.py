"""Writes a report beside the weights: `report.json`, `report.md`, `report.html` and the model card `README.md`.

All four state the same figures (compress/report/figures.py). Each file appears whole or not at all. The page holds its
style and its pictures, and loads nothing.
"""

from pathlib import Path
from typing import Any

from compress.records import Report
from compress.report import card, chain, figures
from compress.report.exported import HEADS, export_lines, exported_view
from compress.report.figures import speed_words, summary_table
from compress.report.pages import environment, write
from compress.report.planned import PLANNED_HEADS, planned_rows
from compress.report.pruning import pruned_views
from compress.report.served import served_line, served_view
from compress.report.serving import ways
from compress.report.tasks import TASK_HEADS, tasks_line, tasks_view
from compress.report.training import TEXT_HEADS, trained_views
from compress.system.units import size

__all__ = [
    "export_lines", "served_line", "speed_words", "summary_table", "tasks_line", "write_model_card", "write_report",
]  # fmt: skip


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
        "chain_plot": plots.chain_curve(report),
    }
    safe: dict[str, Any] = {name: Markup(svg) if svg else None for name, svg in pictures.items()}
    curves = {each.number: plots.loss_curve(each.trained, each.number) for each in view["trained"]}
    safe["loss_plots"] = {number: Markup(svg) for number, svg in curves.items() if svg}
    templates = environment()
    css = templates.get_template("report.css").render()
    page = templates.get_template("report.html.jinja").render(view | safe, css=Markup(css))
    write(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    write(folder / "report.md", templates.get_template("report.md.jinja").render(view))
    write(folder / "report.html", page)


def write_model_card(report: Report, folder: Path) -> None:
    """Writes README.md, a Hugging Face model card, into `folder`, which exists.

    Raises:
        OutputError: the file can't be written there.
    """
    text = environment().get_template("model_card.md.jinja").render(_view(report) | card.view(report))
    write(folder / "README.md", text)


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
        "trained": trained_views(report),
        "text_heads": TEXT_HEADS,
        "chain_heads": chain.HEADS,
        "chain": chain.chain_rows(report),
        "planned_heads": PLANNED_HEADS,
        "planned": planned_rows(report),
        "quality_rows": figures.quality_rows(report),
        "speed_rows": figures.speed_rows(report),
        "speed_words": speed_words(report),
        "speed_protocol": figures.speed_protocol(report),
        "tasks": tasks_view(report),
        "task_heads": TASK_HEADS,
        "served": served_view(report),
        "exported": exported_view(report),
        "export_heads": HEADS,
        "ways": ways(report) if not _failures(report) else [],
        "failures": _failures(report),
        "warnings": _fallback_warning(len(fallbacks), len(rows)) + report.warnings,
        "facts": _facts(report),
        "recipe_yaml": card.as_yaml(report.recipe),
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
