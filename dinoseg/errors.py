"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in the input that the user can mend: shown as one message, without a traceback.

    The message names the value, the rule it breaks and the remedy.
    """
