"""The exports at the end of a recipe: looked at before any work, written once from the last artefact, asked about.

Each is kept in the work folder (compress/runs/kept_export.py), and what its program said as well. They go into the
output with the checkpoint, by the same rename.

Whatever fails here, the checkpoint and its report are written: the report says it, and the command ends with 1.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import RecipeError, UserError, reason
from compress.export_records import Export, ExportCheck
from compress.loop.context import Context
from compress.recipe.export import stem_of
from compress.recipe.schema import Recipe
from compress.records import Report
from compress.runs.artefact import StageArtefact
from compress.runs.exporters import Exporter, exporter_of
from compress.runs.foreseen import foreseen_result, origin_of, sketch_of
from compress.runs.kept_export import KeptExport, Source
from compress.runs.plan import RunPlan
from compress.system.files import write_text
from compress.system.progress import Reporter

_IN_RECIPES = {"--type ": "type: ", "--to ": "to: ", "--int8-inputs": "int8_inputs: true"}  # as options are written


@dataclass(frozen=True)
class Made:
    """What was written.

    Args:
        files: in the work folder, by their names in the output.
        digests: SHA-256 of each, as it was written.
        records: for the report; of what could not be written, too.
    """

    files: dict[str, Path] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    records: list[Export] = field(default_factory=list)

    def added_to(self, report: Report) -> Report:
        """The report with them."""
        return report.model_copy(update={"exports": self.records})


def check_exports(planned: RunPlan) -> list[Exporter]:
    """Refuse, before any work, what could not be written at its end; returns what writes each export.

    Raises:
        RecipeError: what is missing, and what the other program can't have; all at once.
        OutputError: something else has the name of an export.
    """
    if not planned.recipe.export:
        return []
    found, problems, result = [], [], foreseen_result(planned)
    base = origin_of(planned)
    for number, spec in enumerate(planned.recipe.export):
        with sketch_of(base, result.shapes.config) as sketch:
            try:
                exporter = exporter_of(spec)
                exporter.check(sketch, base, result)
            except UserError as error:
                said = _in_recipe(str(error).replace(str(sketch), planned.recipe.model))
                problems.append(f"export.{number}: {said}")
                continue
        exporter.check_place(Path(planned.recipe.output) / _name(exporter, planned.recipe))
        found.append(exporter)
    if problems:
        raise RecipeError(problems)
    return found


def note_unasked(exporters: Sequence[Exporter], reporter: Reporter) -> None:
    """Say which programs can't be asked in the end, and why."""
    for number, exporter in enumerate(exporters):
        if exporter.unasked is not None:
            reporter.warn(f"export.{number}: {exporter.spec.target.program} will not be asked: {exporter.unasked}")


def make_exports(
    exporters: Sequence[Exporter], recipe: Recipe, artefact: StageArtefact, work: Path, fresh: bool, context: Context,
    held: ExitStack,
) -> Made:  # fmt: skip
    """Write each export in the work folder, once, and ask its program about it.

    Args:
        exporters: of the recipe's exports, in their order.
        recipe: whose result it is.
        artefact: of the last stage.
        work: the work folder.
        fresh: write anew what was written before.
        context: where our reader computes, and who is told what happens.
        held: holds on to the files.

    Returns:
        What was written; what could not be, for whatever reason, is said and recorded.
    """
    made = Made()
    for number, exporter in enumerate(exporters):
        try:
            export = _Export(exporter, recipe, artefact, work, fresh, context)
            export.write(held)
        except Exception as error:  # of other programs, of memory and disks: the stages must not be lost by it
            failure, name = _in_recipe(reason(error)), _name(exporter, recipe)
            context.reporter.warn(
                f"export.{number}: {name} could not be written: {failure}; the checkpoint is there without it, and all "
                "stages are kept: mend this or remove the export, and run the same command again"
            )
            made.records.append(_unwritten(exporter, name, failure))
            continue
        files = export.files()
        made.files.update(files)
        made.digests.update({name: export.digests[file] for name, file in files.items()})
        made.records.append(export.asked())
    return made


def _unwritten(exporter: Exporter, name: str, failure: str) -> Export:
    """The record of an export that is not there."""
    spec = exporter.spec
    return Export(
        to=spec.to, type=spec.type, name=name, files=0, bytes=0, carried=0, program=spec.target.program, failure=failure
    )


class _Export(KeptExport):
    """One export under way."""

    def __init__(
        self, exporter: Exporter, recipe: Recipe, artefact: StageArtefact, work: Path, fresh: bool, context: Context
    ) -> None:
        source = Source(artefact.folder, artefact.key, recipe.name)
        super().__init__(exporter, source, _name(exporter, recipe), work, fresh, context.reporter)
        self.recipe, self.context = recipe, context

    def write(self, held: ExitStack) -> None:
        """Write it unless it is there as it was written, and hold on to it; what its user should hear is said."""
        super().write(held)
        for remark in self.written.remarks:
            self.reporter.warn(f"{self.name}: {_in_recipe(remark)}")

    def asked(self) -> Export:
        """What its program says of it; a difference is a warning."""
        exporter, spec = self.exporter, self.exporter.spec
        found = self.files()
        first = next(iter(found)) if spec.target.suffix else self.name
        total = sum(file.stat().st_size for file in found.values())
        record = Export(
            to=spec.to, type=spec.type, name=first, files=len(found), bytes=total, carried=self.written.carried,
            program=spec.target.program, version=exporter.version, note=exporter.unasked,
            remarks=[_in_recipe(remark) for remark in self.written.remarks],
        )  # fmt: skip
        if exporter.unasked is None:
            record = self._earlier(record) or self._ask(record)
        for check in record.checks:
            if check.passed is False:
                self.reporter.warn(
                    f"{self.name} does not pass in {spec.target.program}: {check.name}: {check.detail}; do not use it"
                )
        return record

    def _earlier(self, record: Export) -> Export | None:
        """What was said before of the same files, by the same version of the program to the same questions."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self.said.read_text(encoding="utf-8"))
            found = Export.model_validate(kept["said"])
            if not self.fresh and (kept["check"], found.version) == (self.exporter.check_version, record.version):
                return record.model_copy(update={"checks": found.checks, "pace": found.pace})
        return None

    def _ask(self, record: Export) -> Export:
        self.reporter.say(f"asking {record.program} about {self.name}")
        trust, device = self.recipe.trust_remote_code, self.context.device
        try:
            checks, pace = self.exporter.ask(self.source.folder, self.written, trust, device)
        except Exception as error:  # of memory, of disks, of our own reader: the stages must not be lost by it
            failed = ExportCheck(name=record.program, passed=False, detail=f"could not be asked: {reason(error)}")
            return record.model_copy(update={"checks": [failed]})
        looked = [ExportCheck(name=each.name, passed=each.passed, detail=each.detail) for each in checks]
        record = record.model_copy(update={"checks": looked, "pace": pace})
        if record.passed and not record.busy:
            kept = {"check": self.exporter.check_version, "said": record.model_dump(mode="json")}
            with suppress(OSError):  # a full disk: it will be asked again
                write_text(self.said, json.dumps(kept))
        return record


def _name(exporter: Exporter, recipe: Recipe) -> str:
    return exporter.spec.file_name(stem_of(recipe.name))


def _in_recipe(text: str) -> str:
    """A message of an exporter, whose options are as a recipe writes them."""
    for option, key in _IN_RECIPES.items():
        text = text.replace(option, key)
    return text
