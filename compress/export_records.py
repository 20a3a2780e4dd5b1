"""Typed records of what was written beside a checkpoint for other programs: `exports` in report.json."""

from compress.record_types import Count, Typed
from compress.served_records import ServedPace


class ExportCheck(Typed):
    """One thing that was looked at; `passed` is None where it could not be, or a difference is borne."""

    name: str
    passed: bool | None
    detail: str


class Export(Typed):
    """A file, or a folder, in another program's format.

    `name` is it inside the checkpoint's folder, the first of `files` where there are parts; `bytes` is all of it.
    `carried` counts the matrices whose codes it has as the checkpoint has them. `version` and `checks` are of the
    program that was asked; `note` says why none was. `failure` says why there is nothing: it could not be written.
    """

    to: str
    type: str
    name: str
    files: Count
    bytes: Count
    carried: Count
    program: str
    version: str | None = None
    checks: list[ExportCheck] = []
    note: str | None = None
    pace: ServedPace | None = None
    remarks: list[str] = []
    failure: str | None = None

    @property
    def passed(self) -> bool | None:
        """Whether it is there and the program reads in it what the checkpoint is; None where it was not asked."""
        if self.failure is not None:
            return False
        return None if not self.checks else all(check.passed is not False for check in self.checks)

    @property
    def busy(self) -> bool:
        """Whether other work slowed it so much that its pace says little."""
        return self.pace is not None and self.pace.waited > 0.05
