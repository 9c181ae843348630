"""Every error this package raises, in one tree.

```
PosExtError
├── InvalidParameterError (ValueError)     a factor, length or option that cannot be
├── UnknownMethodError (ValueError)        no method of that name
├── MethodNotApplicableError (ValueError)  the method is for another positional scheme
├── UnsupportedModelError                  a model this package cannot patch or measure, refused by name
├── AlreadyPatchedError                    a second patch on a patched model
├── NotPatchedError                        nothing to undo
├── NoEffectError                          the patch would change nothing
├── PlanError (ValueError)                 a plan that is corrupt, hostile or of a newer schema
├── PlanMismatchError                      a plan made for another model
├── DocumentError (ValueError)             an empty data set, a missing column, a text that is too short
└── EvaluationError                        non-finite logits, or two ways of measuring that disagree
```

Each message says what was got, what is allowed, and what to type next.
"""


class PosExtError(Exception):
    """Base class of every error raised by `hf_posext`."""


class InvalidParameterError(PosExtError, ValueError):
    """A factor, length or option that cannot be."""


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
    """The patch would leave every phase of the model as it is."""


class PlanError(PosExtError, ValueError):
    """A plan that is corrupt, out of bounds, or written by a newer schema."""


class PlanMismatchError(PosExtError):
    """A plan made for a model with another positional scheme."""


class DocumentError(PosExtError, ValueError):
    """Documents that cannot be evaluated: none, without the text column, or too short."""


class EvaluationError(PosExtError):
    """A measurement that cannot be trusted: non-finite logits, or two ways of measuring that disagree."""
