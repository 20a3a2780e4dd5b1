"""What was written for other programs beside a checkpoint, as reports show it."""

from dataclasses import dataclass

from compress.export_records import Export
from compress.records import Report
from compress.report.figures import rate
from compress.system.units import size

HEADS = ["File or folder", "Size", "In its program", "Prefill, tokens/s", "Decode, tokens/s", "Peak memory"]


@dataclass(frozen=True)
class ExportedView:
    """The section `Exported`.

    Args:
        rows: of `HEADS`, one for each export.
        failures: exports that are not there or must not be used, and why, a line each.
        details: what else was looked at, a line each.
        note: how speeds are to be read; empty where there are none.
    """

    rows: list[list[str]]
    failures: list[str]
    details: list[str]
    note: str


def exported_view(report: Report) -> ExportedView | None:
    """The section, where the recipe has exports."""
    if not report.exports:
        return None
    checks = [(export, check) for export in report.exports for check in export.checks]
    missing = [_line(export, f"could not be written: {export.failure}") for export in report.exports if export.failure]
    return ExportedView(
        rows=[_row(export) for export in report.exports],
        failures=[
            *missing,
            *(_line(export, f"{each.name}: {each.detail}") for export, each in checks if each.passed is False),
        ],
        details=[
            *(_line(export, f"{each.name}: {each.detail}") for export, each in checks if each.passed is not False),
            *(_line(export, words) for export in report.exports for words in _more(export)),
        ],
        note=_note(report.exports),
    )


def export_lines(report: Report) -> list[str]:
    """The same for the terminal, a line for each export."""
    lines = []
    for export in report.exports:
        line = f"{export.name}, {size(export.bytes)}: {_words(export)}"
        if export.failure is not None:
            line = f"{export.name}: {_words(export)}: {export.failure}"
        if export.busy:
            line += "; its speed says little, for the machine was busy with other work"
        elif export.pace is not None:
            prefill, decode = export.pace.prefill_tokens_per_second, export.pace.decode_tokens_per_second
            line += f"; {rate(prefill)} tokens/s prefill, {rate(decode)} decode"
        lines.append(line)
    return lines


def _row(export: Export) -> list[str]:
    pace = export.pace
    figures = ["", "", ""]
    if pace is not None:
        figures = [rate(pace.prefill_tokens_per_second), rate(pace.decode_tokens_per_second), size(pace.peak_bytes)]
    return [export.name, "" if export.failure is not None else size(export.bytes), _words(export), *figures]


def _words(export: Export) -> str:
    if export.failure is not None:
        return "COULD NOT BE WRITTEN"
    if export.passed is None:
        return f"{export.program} was not asked: {export.note or 'it gave no answer'}"
    program = f"{export.program} {export.version}"
    return f"{program} opens it: the same but for rounding" if export.passed else f"FAILS in {program}; do not use it"


def _more(export: Export) -> list[str]:
    carried = [f"{export.carried} matrices have the checkpoint's own codes, unchanged"] if export.carried else []
    parts = [f"{export.files} files, of which programs are given the first"] if _is_split(export) else []
    return [*carried, *parts, *export.remarks]


def _is_split(export: Export) -> bool:
    return export.to == "gguf" and export.files > 1


def _line(export: Export, words: str) -> str:
    return f"{export.name}: {words}"


def _note(exports: list[Export]) -> str:
    if all(export.pace is None for export in exports):
        return ""
    slowed = any(export.busy for export in exports)
    busy = " The machine was busy with other work, so they say little." if slowed else ""
    return f"Speeds are of one sequence at a time on this CPU; memory includes the libraries.{busy}"
