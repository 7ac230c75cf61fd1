"""The error for bad input."""

MAX_LISTED = 10  # bad cases named in one message


class UserError(ValueError):
    """Bad input. The message names the file or value and the fix.

    `nnunet_ssl` shows the message alone; below nnU-Net's own commands it ends a traceback.
    """


class UnsupportedError(UserError, NotImplementedError):
    """What a method cannot do. Nothing has been made yet."""
