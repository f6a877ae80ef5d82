"""`mim-refiner`: the commands, and the job behind `accelerate launch training/refine.py`.

    mim-refiner refine --model facebook/vit-mae-large --dataset my_images/ --output_dir out
    mim-refiner pretrain my_images/ --objective data2vec2 --output_dir out
    mim-refiner convert mae_pretrain_vit_large.pth mae-l16
    mim-refiner evaluate my_images/ --model out/model --against facebook/vit-mae-large
    mim-refiner embed photos/ --model facebook/vit-mae-large --out features/ --blocks 11 23
    mim-refiner cluster photos/ --model out/model --out groups/    (then open groups/index.html)
    mim-refiner push out/model user/name
    mim-refiner export out/model out/timm --to timm                (or vit, or onnx)
    mim-refiner page out/model --out site/         (groups images in the browser)
    mim-refiner replay out                                         (a step that failed, again)

On several processes: accelerate launch -m mim_refiner_hf.cli refine ... (or pretrain, evaluate,
embed). `mim-refiner COMMAND --help` explains every setting.

Exit codes: 0 done, 2 wrong use (one line says which value and what is allowed), 3 `refine
--fail_if_not_better` whose result was not judged better than its start, 1 something else failed,
130 and 143 interrupted (Ctrl-C, SIGTERM).
"""

import argparse
import io
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from ..runtime.ending import CommandFailure, EarlyEnd
from ..runtime.ranks import check_ranks, stated_processes, stated_rank, take_ranks
from ..runtime.room import SaveError, room_to_write
from ..runtime.text import VisibleFormatter, on_terminal
from ..runtime.wording import in_the_shell
from .cluster import parse_cluster
from .flags import Work
from .measuring import parse_embed, parse_evaluate
from .models import parse_convert, parse_export, parse_page, parse_push
from .training import parse_pretrain, parse_refine, parse_replay

COMMANDS: dict[str, Callable[[Sequence[str]], Work]] = {
    "refine": parse_refine,
    "pretrain": parse_pretrain,
    "convert": parse_convert,
    "cluster": parse_cluster,
    "push": parse_push,
    "evaluate": parse_evaluate,
    "export": parse_export,
    "embed": parse_embed,
    "page": parse_page,
    "replay": parse_replay,
}
"""What each reads from its words, and then does."""

# The commands that several processes do together.
_SHARED = ("refine", "pretrain", "evaluate", "embed")


def check_alone(name: str) -> None:
    """Refuse a command that one process does in a job of several.

    Each of them would do it all, and write the same files.

    Raises:
        ValueError: with what to do.
    """
    processes = stated_processes()
    if name not in _SHARED and processes > 1:
        raise ValueError(
            f"{name}: runs in one process, not {processes}; start it without the launcher"
        )


def command(
    name: str, arguments: Sequence[str] | None = None, *, launched: bool | None = None
) -> int:
    """Run one command and translate what it raises into an exit code and one line on stderr.

    Args:
        arguments: its words; None for those of this process.
        launched: they are those of this process, so that it can be started anew; None for whether
            `arguments` is None.
    """
    launched = arguments is None if launched is None else launched
    if isinstance(sys.stdout, io.TextIOWrapper):
        # as stderr is: a name with odd bytes must not end the command that prints it
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        take_ranks()
        check_alone(name)
        check_ranks()
        # heavy rooms are imported once the words are understood
        with in_the_shell():
            work = COMMANDS[name](sys.argv[1:] if arguments is None else arguments)
            return _done(work, launched)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {on_terminal(error)}", file=sys.stderr)
        return 2
    except EarlyEnd as end:
        if stated_rank() == 0:
            print(on_terminal(end), file=sys.stderr)
        return end.exit_code
    # OSError: disk full, read-only, the network
    except (CommandFailure, FloatingPointError, OSError) as error:
        print(f"error: {on_terminal(error)}", file=sys.stderr)
        if isinstance(error, SaveError) and launched:
            print(f"the command that continues: {shlex.join(sys.argv)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        print(
            "interrupted; the same command starts again, "
            "from the last checkpoint where there is one",
            file=sys.stderr,
        )
        # 143 after SIGTERM, which raises a kind of its own
        return getattr(interruption, "exit_code", 130)


def _done(work: Work, launched: bool) -> int:
    """Do the work, or have it done by the processes that a launcher meant; the exit code.

    Args:
        launched: the words are those of this process, so that it can be started anew.
    """
    from ..runtime.distributed import lost_processes_named
    from ..runtime.launch import launch_processes, launched_short, take_the_cores
    from ..runtime.signals import ended_by_signals

    if launched:
        processes = launched_short()
        if processes:
            return launch_processes(processes)
        take_the_cores()
    with ended_by_signals(), room_to_write(), lost_processes_named():
        work()
    return 0


def refine_command() -> int:
    """What `training/refine.py` runs."""
    return command("refine")


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command `mim-refiner`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="mim-refiner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"mim-refiner {version('mim_refiner_hf')}"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    chosen = parser.parse_args(words[:1]).command
    return command(chosen, words[1:], launched=arguments is None)
