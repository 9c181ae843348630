"""Exceptions raised by this package, all subclasses of [`PosExtError`].

Each message states the expected value, the actual value, and what to do next.
"""


class PosExtError(Exception):
    """Base class of every error raised by `hf_posext`."""


class MissingExtraError(PosExtError, ImportError):
    """An optional package that is not installed. The message contains the install command."""


class InvalidParameterError(PosExtError, ValueError):
    """A factor, length, or option that is out of bounds."""


class UnknownMethodError(PosExtError, ValueError):
    """A method name that is not registered."""


class MethodNotApplicableError(PosExtError, ValueError):
    """A method that does not support the model's positional scheme."""


class UnsupportedModelError(PosExtError):
    """A model that cannot be patched or measured. The message contains the reason."""


class AlreadyPatchedError(PosExtError):
    """A model that is already patched. Undo the patch first."""


class NotPatchedError(PosExtError):
    """A model that is not patched."""


class NoEffectError(PosExtError):
    """A patch that would not change the model's positions."""


class UndoError(PosExtError):
    """A change that could not be undone. It stays in the undo log, and all other changes were undone."""


class PlanError(PosExtError, ValueError):
    """A plan that is corrupt, out of bounds, or written with a newer schema."""


class PlanMismatchError(PosExtError):
    """A plan made for a model with a different positional scheme."""


class CheckpointError(PosExtError, ValueError):
    """A checkpoint or adapter directory that is incomplete, corrupt, or malicious. None of its code was executed."""


class ExportError(PosExtError):
    """Positions that a server or plain transformers cannot compute. The message names an alternative."""


class DocumentError(PosExtError, ValueError):
    """Documents that cannot be evaluated: none, without the text column, or too short."""


class EvaluationError(PosExtError):
    """A measurement that cannot be trusted: non-finite logits, or two ways of measuring that disagree."""


class NonFiniteError(EvaluationError):
    """Non-finite logits in one document. Other documents can still be measured."""


class OutOfMemoryError(EvaluationError):
    """A text that does not fit in memory, even in the smallest chunks. Shorter texts may fit."""


class JournalError(PosExtError):
    """A journal that belongs to another run, is corrupt, or cannot be written because the disk is full."""


class TrainingError(PosExtError):
    """Training that cannot continue, because of a non-finite loss or a mismatch with the run to resume."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error, with the next one if it is a heading; its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
