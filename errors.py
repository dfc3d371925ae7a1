"""What can go wrong, by whose hand it is mended.

Every message says what was expected, what was found (file, row, column) and what to do next.
"""


class PruneryError(Exception):
    """Root of every error that Prunery raises on purpose."""


class InputError(PruneryError):
    """The data or an argument given by the caller is not what the operation needs."""


class RecipeError(InputError):
    """A recipe or an option is unknown, misspelt or out of range."""


class StoreError(PruneryError):
    """A table, index or manifest is missing, incomplete or does not match its digest."""


class ModelError(PruneryError):
    """A model cannot be found, has the wrong digest or layout, or gave non-finite numbers."""


class BudgetError(InputError):
    """A budget cannot be met, or would be overrun by going on."""


class PruneryWarning(UserWarning):
    """Something the user should know that does not stop the work (a licence, a clipped input)."""
