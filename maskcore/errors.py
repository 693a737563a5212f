"""The one exception that a person's input can cause."""


class UserError(ValueError):
    """Input that cannot be used; its message is one sentence that says what to change.

    Command-line verbs print the message and exit with status 2; library callers may catch it
    as a ``ValueError``.
    """
