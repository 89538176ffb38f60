"""The errors that a front-end turns into exit code 2: they are the user's to mend, and the message says
how."""


class UserError(ValueError):
    """A wrong input, flag or environment; the message holds the numbers and names the remedy."""


class DamagedDataError(UserError):
    """A file of ours that is truncated, altered, missing or of an unknown version; names the file and the
    remedy."""
