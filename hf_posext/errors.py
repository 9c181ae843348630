"""Every error this package raises, in one tree.

```
PosExtError
├── MissingExtraError (ImportError)        a package that an extra of hf_posext installs
├── InvalidParameterError (ValueError)     a factor, length or option out of bounds
├── UnknownMethodError (ValueError)        no method of that name
├── MethodNotApplicableError (ValueError)  the method is for another positional scheme
├── UnsupportedModelError                  a model this package cannot patch or measure, refused by name
├── AlreadyPatchedError                    a second patch on a patched model
├── NotPatchedError                        nothing to undo
├── NoEffectError                          the patch would change nothing
├── UndoError                              a change that could not be put back; the others were
├── PlanError (ValueError)                 a plan that is corrupt, hostile or of a newer schema
├── PlanMismatchError                      a plan made for another model
├── CheckpointError (ValueError)           a checkpoint or adapter directory that is incomplete, corrupt or hostile
├── ExportError                            positions that a server cannot compute
├── DocumentError (ValueError)             an empty data set, a missing column, a text that is too short
├── EvaluationError                        two ways of measuring that disagree, results that cannot be read
│   ├── NonFiniteError                     logits that are not finite in one document
│   └── OutOfMemoryError                   a text that does not fit, however little of it is read at a time
├── JournalError                           the journal of another run, a corrupt one, or a full disk
└── TrainingError                          a loss that is not finite, a run to resume that was another one
```

Each message says what was got, what is allowed, and what to type next.
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
