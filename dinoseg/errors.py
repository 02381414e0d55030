"""What the user can mend: the one exception that means it, and the numbers of a full disk."""

import errno

from dinoseg.wording import printable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # `errno` of an OSError where making room and running again helps


class UserError(Exception):
    """A mistake in the input that the user can mend: shown as one message, without a traceback.

    The message names the value, the rule it breaks and the remedy. Its text is `printable`, whatever a file is called.
    """

    def __str__(self) -> str:
        return printable(super().__str__())
