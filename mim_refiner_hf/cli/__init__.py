"""`mim-refiner`: the commands of the shell, one small file per group; `main` and `command` start them."""

from .main import COMMANDS, command, main, refine_command

__all__ = ["COMMANDS", "command", "main", "refine_command"]
