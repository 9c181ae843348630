"""Every error that this package raises; each is a [`PosExtError`].

Each message states what was expected, what was got, and what to type next.
"""


class PosExtError(Exception):
    """Base class of every error raised by `hf_posext`."""


class MissingExtraError(PosExtError, ImportError):
    """A package is not installed; the message contains the command that installs it."""


class InvalidParameterError(PosExtError, ValueError):
    """A factor, length or option out of bounds."""


class UnknownMethodError(PosExtError, ValueError):
    """No method of that name is registered."""


class MethodNotApplicableError(PosExtError, ValueError):
    """The method extends another positional scheme than the one the model has."""


class UnsupportedModelError(PosExtError):
    """The model cannot be patched or measured; the message names it and says why."""


class AlreadyPatchedError(PosExtError):
    """The model carries a patch already; undo it first."""


class NotPatchedError(PosExtError):
    """The model carries no patch."""


class NoEffectError(PosExtError):
    """The patch would leave the positions of the model as they are."""


class UndoError(PosExtError):
    """A change of a patch that could not be put back; it stays in the undo log, and all others were undone."""


class PlanError(PosExtError, ValueError):
    """A plan that is corrupt, out of bounds, or written by a newer schema."""


class PlanMismatchError(PosExtError):
    """A plan made for a model with another positional scheme."""


class CheckpointError(PosExtError, ValueError):
    """A checkpoint or adapter directory that is incomplete, corrupt or hostile; nothing of it was executed."""


class ExportError(PosExtError):
    """Positions that a server, or plain transformers, cannot compute; the message says what it can."""


class DocumentError(PosExtError, ValueError):
    """Documents that cannot be evaluated: none, without the text column, or too short."""


class EvaluationError(PosExtError):
    """A measurement that cannot be trusted: non-finite logits, or two ways of measuring that disagree."""


class NonFiniteError(EvaluationError):
    """Logits of one document are not finite; others may still be measured."""


class OutOfMemoryError(EvaluationError):
    """A text that does not fit into memory, however little of it is read at a time; shorter ones may."""


class JournalError(PosExtError):
    """The journal of a run cannot be continued or written: it is of another run, corrupt, or the disk is full."""


class TrainingError(PosExtError):
    """A training that cannot go on: a loss that is not finite, or a run to resume that was another one."""
