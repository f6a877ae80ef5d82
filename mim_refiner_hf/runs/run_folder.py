"""What a run's folder holds from its start, and what a failed step leaves there.

begin_folder(prepared)                    # recipe.json, data.json
save_start(start_folder(recipe), encoder, processor)
"""

import dataclasses
from pathlib import Path
from typing import Any

from ..data.fingerprint import RECORD, write_data_record
from ..data.images import ImageDataset
from ..model.modeling_mim_refiner import MimRefinerModel
from ..refinement.failure import FAILURES, NotFiniteError
from ..runtime.files import staged_folder, write_json
from ..runtime.finite import check_finite
from ..runtime.quiet import without_bars
from ..runtime.versions import FORMAT_VERSIONS
from .prepare import Prepared, check_start_folder


def begin_folder(prepared: Prepared) -> None:
    """What the output folder holds from the start: the recipe, and what the data consist of."""
    output = Path(prepared.recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    version = {"format_version": FORMAT_VERSIONS["recipe"]}
    write_json(output / "recipe.json", version | prepared.recipe.as_written())
    if isinstance(prepared.images.training, ImageDataset):
        write_data_record(output / RECORD, prepared.images.training)


def save_start(folder: Path, encoder: MimRefinerModel, processor: Any) -> None:
    """Keep the encoder that a run starts from: what its result is judged by, and may ship.

    Raises:
        NotFiniteTensorError: for weights that hold NaN or infinity.
    """
    check_finite(encoder.state_dict(), str(folder), "name another model to start from")
    with staged_folder(folder, check_start_folder) as new:
        with without_bars():
            encoder.save_pretrained(new)
        processor.save_pretrained(new)


def with_report(error: NotFiniteError, output: Path, writes: bool) -> NotFiniteError:
    """The error, with where its report lies; the main process `writes` it."""
    path = output / FAILURES / f"step-{error.report.step:08d}.json"
    if writes:
        path.parent.mkdir(exist_ok=True)
        write_json(path, dataclasses.asdict(error.report))
    hint = f". The report: {path}; `mim-refiner replay {output}` runs the step again"
    return NotFiniteError(error.report, hint)
