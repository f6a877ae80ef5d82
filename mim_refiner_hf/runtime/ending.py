"""How a command ends that does not end well: one sentence for its user, and an exit code.

    class PushError(CommandFailure): ...             # "error: ...", exit code 1

The command line catches these two, and so needs none of the rooms that raise them.
"""


class CommandFailure(RuntimeError):
    """Something failed that the message explains; the exit code is 1."""


class EarlyEnd(RuntimeError):
    """A command came to an end of another kind, which the message explains.

    Attributes:
        exit_code: of the command.
    """

    exit_code = 1
