"""The error for bad input."""

MAX_LISTED = 10  # bad cases named in one message


class UserError(ValueError):
    """Bad input. The message names the file or value and the fix; no traceback is shown for it."""
