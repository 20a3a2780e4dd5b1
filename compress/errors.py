"""The exceptions of dscompress, and the exit code that each one means.

    DscompressError            1  something went wrong that the user could not have known
    ├── NumericalError         1  NaN or inf in activations, a Hessian that no damping repairs
    ├── VerificationError      1  the stock loader disagrees with what was computed
    ├── PeerError              1  another process of the same run is gone
    └── UserError              2  a mistake in a recipe, a path, a model folder, an option
        ├── RecipeError        2  one or more problems of a recipe, each with file:line
        ├── ModelError         2  a model folder, file or id that can't be used
        ├── CalibrationError   2  calibration or evaluation text that can't be used
        └── OutputError        2  an output or work folder that can't be written, or is in use

The message is what the user reads: one line (a line per problem for RecipeError) that names the field or
file, the value, what is allowed and what to do. A traceback is shown only with `--debug`.
"""

from collections.abc import Sequence


class DscompressError(Exception):
    """Base of every error that dscompress raises on purpose."""

    exit_code = 1


class NumericalError(DscompressError):
    """The numbers of a run stopped making sense: NaN or inf activations, an unfactorable Hessian."""


class VerificationError(DscompressError):
    """A written checkpoint, opened by the stock loader, differs from what was computed."""


class PeerError(DscompressError):
    """One of the processes that share a run ended or can't be reached."""


class UserError(DscompressError):
    """A mistake that the user can mend, said in one line."""

    exit_code = 2


class RecipeError(UserError):
    """All problems of one recipe.

    Args:
        problems: one line each, starting with `file:line`.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class ModelError(UserError):
    """A model that can't be read: missing, truncated, pickled, already quantized, of an unknown shape."""


class CalibrationError(UserError):
    """Text that can't be used: missing, empty, not UTF-8, too short, with another checksum."""


class OutputError(UserError):
    """A folder that can't be written: not ours, not writable, full, or locked by another run."""


def reason(error: Exception) -> str:
    """Why something failed, in one line: our own words as they are, others behind the error's type."""
    words = " ".join(str(error).split())
    return words if isinstance(error, DscompressError) else f"{type(error).__name__}: {words}"
