"""The errors that the command line prints in one line."""


class InputError(ValueError):
    """Something the user gave is wrong: an argument, a file, a configuration.

    The message is one line that says what is wrong, where, and what would be right. The command line prints it
    without a traceback and exits with status 2.
    """


class RunFailed(RuntimeError):
    """The machine ended the work, through no fault of the input: the message says what happened and what to do.

    The command line prints it without a traceback and exits with status 1.
    """


class Preempted(RuntimeError):
    """The run was told to end, by a signal, and has written its checkpoint: the message says how to continue.

    The command line prints it without a traceback and exits with status 143, that of a process ended by SIGTERM.
    """
