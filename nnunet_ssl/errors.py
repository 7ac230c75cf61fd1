"""The error for bad input."""


class UserError(ValueError):
    """Bad input. The message names the file or value and the fix; no traceback is shown for it."""
