"""`mim-refiner`: the commands of the shell; `main` and `command` start them."""

from .main import COMMANDS, command, main, refine_command

__all__ = ["COMMANDS", "command", "main", "refine_command"]
