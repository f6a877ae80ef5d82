"""Which process of a job this is, by what its launcher says, before the processes have met.

    take_ranks()                         # mpirun's names become torch's, as torchrun sets them
    check_ranks()                        # ValueError unless the processes can find each other
    stated_rank(), stated_processes()    # 1, 4

torch reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. mpirun, and srun with PMI, have names of
their own: whoever does not know them takes each process for a run of its own, all in one folder.
"""

import os
import re

# rank, processes, and both on one machine: of Open MPI, of MPICH, Intel MPI and PMI, of MVAPICH
_LAUNCHERS = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
)
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")


def take_ranks() -> None:
    """Give what another launcher says torch's names.

    Raises:
        ValueError: where a number makes no sense.
    """
    if "WORLD_SIZE" in os.environ:
        return
    for theirs in _LAUNCHERS:
        if _number(theirs[1], 1) > 1:
            for our, their in zip(_OURS, theirs, strict=True):
                if os.environ.get(their):
                    os.environ[our] = os.environ[their]
            break


def check_ranks() -> None:
    """Check that the processes of the job can find each other.

    To be called before torch is imported, which then keeps its warnings about lost processes.

    Raises:
        ValueError: where no meeting point is named, or a number makes no sense.
    """
    processes = stated_processes()
    if processes == 1:
        return

    missing = [name for name in ("RANK", *_MEETING) if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"this is one of {processes} processes, but {' and '.join(missing)} are not set: set "
            "MASTER_ADDR to the machine of the first process and MASTER_PORT to a free port there, "
            "and RANK to the number of each process from 0, or start one process"
        )
    if stated_rank() >= processes:
        raise ValueError(
            f"RANK={stated_rank()} must be less than the number of processes, "
            f"WORLD_SIZE={processes}"
        )

    # of a process that was lost torch warns by a page of addresses; read before it is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def stated_rank() -> int:
    """The number of this process, from 0; of a single one 0, whatever RANK says."""
    return _number("RANK", 0) if stated_processes() > 1 else 0


def stated_processes() -> int:
    """How many processes the job has."""
    return max(1, _number("WORLD_SIZE", 1))


def _number(name: str, default: int) -> int:
    stated = os.environ.get(name, "")
    if not stated:
        return default
    if not re.fullmatch(r"\d{1,7}", stated):
        raise ValueError(f"{name}={stated[:40]!r} must be a whole number, 0 or more")
    return int(stated)
