"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Something the user gave is wrong: an argument, a file, a configuration.

    The message is one line that says what is wrong, where, and what would be right. The command line prints it
    without a traceback and exits with status 2.
    """
