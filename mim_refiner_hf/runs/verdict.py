"""Whether a refinement is better than its start, judged without labels, and so which of them ships.

    judged = judge_run(prepared, accelerator, start, refined)
    judged.verdict.outcome, judged.verdict.reason       # "better", "separation d' 1.83 -> 2.41 ..."

A result is better when all of this holds:

- every feature is finite;
- the weights moved: by a two-hundredth of their length or more;
- the features did not collapse: RankMe is at least `GUARD` times the start's. It falls in good
  refinements too, to 0.5 of the start's, and to 0.1 and less in collapsed ones;
- the separation d' of a photo from other photos, by a distorted copy of it, rose by more than
  chance: the 95 % interval of its paired change lies above 0 (evaluation/label_free.py);
- there are `LEAST_PHOTOS` photos or more to tell it by.

Else the start ships. What cannot be judged, such as a stream, ships as it was refined, and says so.
Both sides are measured when the training has ended, the start from the copy of it that the run's
folder keeps: a run that was interrupted comes to the same verdict.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

from accelerate import Accelerator

from ..conversion import load_encoder
from ..data.broken import readable
from ..data.images import ImageDataset, evenly_spaced
from ..data.loading import Loading
from ..evaluation.evidence import Change, JudgedChange, change_between
from ..evaluation.label_free import (
    JUDGED_IMAGES,
    LabelFree,
    TwoViews,
    label_free_scores,
    relative_change,
    two_views,
)
from ..model.modeling_mim_refiner import MimRefinerModel
from ..publishing.run_file import Judgement
from ..runtime.distributed import gather_objects
from ..runtime.wording import setting
from .prepare import Prepared, RunImages, start_folder

logger = logging.getLogger(__name__)

GUARD = 0.4
"""The least share of the start's RankMe."""
LEAST_CHANGE = 0.005
"""The least relative change of the weights."""
LEAST_PHOTOS = 20
"""With fewer, an interval says nothing."""
# held-out photos judge where there are so many
_ENOUGH_HELD_OUT = 200
_HELD_OUT = "held-out photos"
_TRAINING = "training photos"

Outcome = Literal["better", "not better", "not judged"]


@dataclass(frozen=True)
class Verdict:
    """What was decided, by which numbers.

    Attributes:
        reason: one sentence with the numbers that decided.
        photos: how many judged, and which they are.
        weights_change: relative change of the weights; None where it was not looked at.
        before, after: what `LabelFree.metrics` says of start and result; None where not measured.
        changes: of every score, by name.
    """

    outcome: Outcome
    reason: str
    photos: str = field(default="no photos", repr=False)
    weights_change: float | None = field(default=None, repr=False)
    before: dict[str, float] | None = field(default=None, repr=False)
    after: dict[str, float] | None = field(default=None, repr=False)
    changes: dict[str, Change] = field(default_factory=dict, repr=False)

    @property
    def ships_start(self) -> bool:
        """Whether the start ships in place of the result."""
        return self.outcome == "not better"

    @property
    def changes_as_json(self) -> dict[str, JudgedChange]:
        """Every change as metrics.json has it."""
        return {name: change.as_json() for name, change in self.changes.items()}

    def as_json(self) -> Judgement:
        """As metrics.json has it under "judgement"."""
        return {
            "reason": self.reason,
            "photos": self.photos,
            "ships": "start" if self.ships_start else "refined",
            "weights_change": self.weights_change,
            "before": self.before,
            "after": self.after,
            "changes": self.changes_as_json,
        }

    def __str__(self) -> str:
        return f"{self.outcome[0].upper()}{self.outcome[1:]}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Judged:
    """A verdict, and in the main process what its pictures are drawn from.

    Attributes:
        photos: those that judged.
        views: of start and result.
        found: of start and result.
    """

    verdict: Verdict
    photos: ImageDataset | None = field(default=None, repr=False)
    views: tuple[TwoViews, ...] = field(default=(), repr=False)
    found: tuple[LabelFree, ...] = field(default=(), repr=False)

    @property
    def finite(self) -> bool:
        """Whether all features that were looked at are."""
        return all(side.finite for side in self.views)


def judging_photos(images: RunImages) -> tuple[ImageDataset | None, str]:
    """The photos that judge, at most 2000 evenly spaced ones, and what they are called.

    Held-out ones where there are 200 or more, else the training photos, which serve as well; of a
    stream the held-out ones, however few.
    """
    photos = images.evaluation
    kind = _HELD_OUT
    training = images.training
    if isinstance(training, ImageDataset):
        enough = min(_ENOUGH_HELD_OUT, len(training))
        if photos is None or len(photos) < enough:
            photos = training
            kind = _TRAINING
    return (None if photos is None else evenly_spaced(photos, JUDGED_IMAGES)), kind


def judges_text(images: RunImages) -> str:
    """Who will judge the run, said before it begins."""
    photos, kind = judging_photos(images)
    if photos is None:
        return f"not judged, so it ships: a stream is gone once read; {_name_photos()}"
    if len(photos) < LEAST_PHOTOS:
        return (
            f"{len(photos)} {kind} are too few to judge, it takes {LEAST_PHOTOS}: the start will "
            "ship, and what was trained lie beside it"
        )
    return f"by {len(photos)} {kind}, without labels; where nothing got better the start ships"


def _name_photos() -> str:
    return f"name photos by {setting('eval_dataset')}"


def judge_run(
    prepared: Prepared,
    accelerator: Accelerator,
    start: MimRefinerModel | None,
    refined: MimRefinerModel,
) -> Judged:
    """The verdict on a run, the same in every process.

    Args:
        start: as the run began; None where it is not known any more.
    """
    photos, kind = judging_photos(prepared.images)
    if start is None:
        lost = start_folder(prepared.recipe)
        return Judged(Verdict("not judged", f"{lost}, the start to compare with, is missing"))
    if photos is None:
        return Judged(Verdict("not judged", f"a stream is gone once read; {_name_photos()}"))

    # the held-out ones are known to be readable
    if kind == _TRAINING:
        photos, broken = readable(photos, prepared.recipe.num_workers)
        if broken:
            reason = broken[0]["reason"]
            logger.warning("%d broken photos do not judge, first: %s", len(broken), reason)
    called = f"{len(photos)} {kind}"
    if len(photos) < 2:
        return Judged(Verdict("not better", f"{called}: too few to judge", called))

    old, new = (_views(prepared, encoder, photos) for encoder in (start, refined))
    verdict: Verdict | None = None
    found: tuple[LabelFree, ...] = ()
    if accelerator.is_main_process:
        moved = relative_change(start.state_dict(), refined.state_dict())
        if old.finite and new.finite:
            before = label_free_scores(old, seed=prepared.recipe.seed)
            after = label_free_scores(new, seed=prepared.recipe.seed)
            found = (before, after)
            verdict = verdict_on(before, after, moved, called)
        else:
            verdict = Verdict("not better", "features are not finite", called, moved)
    agreed = gather_objects(verdict)[0]
    assert agreed is not None
    return Judged(agreed, photos, (old, new), found)


def _views(prepared: Prepared, encoder: MimRefinerModel, photos: ImageDataset) -> TwoViews:
    """What an encoder makes of the photos and of copies distorted as in the training."""
    recipe = prepared.recipe
    return two_views(
        encoder,
        photos,
        prepared.start.processor,
        flip=recipe.flip,
        colour=recipe.colour,
        seed=recipe.seed,
        loading=Loading(num_workers=recipe.num_workers),
    )


def verdict_on(before: LabelFree, after: LabelFree, moved: float, photos: str) -> Verdict:
    """The verdict by the rules above.

    Args:
        moved: the relative change of the weights.
        photos: what the photos are called, with their number.
    """
    changes = {
        name: change_between(before.scores[name], score) for name, score in after.scores.items()
    }
    change = changes["separation"]
    low, high = change.interval
    old, new = (side.scores["separation"].value for side in (before, after))
    said = f"separation d' {old:.2f} -> {new:.2f} (95 % of the change {low:+.2f} to {high:+.2f})"

    outcome: Outcome = "not better"
    if after.photos < LEAST_PHOTOS:
        reason = f"{photos} are too few to judge, it takes {LEAST_PHOTOS}; {said}"
    elif moved < LEAST_CHANGE:
        faster = f"a higher {setting('learning_rate')} or a lower {setting('ema_decay')}"
        reason = f"the weights moved by {100 * moved:.2f} % only; {faster} moves them more"
    elif after.rankme < GUARD * before.rankme:
        fell = f"RankMe {before.rankme:.1f} -> {after.rankme:.1f}, below {GUARD} of the start's"
        reason = f"the features collapsed ({fell})"
    elif low > 0:
        outcome = "better"
        reason = f"{said} on {photos}"
    else:
        reason = f"{said} on {photos}: no rise beyond chance"
    return Verdict(outcome, reason, photos, moved, before.metrics, after.metrics, changes)


def load_start(prepared: Prepared) -> MimRefinerModel | None:
    """The encoder that the run began with, from its folder; None where that is missing.

    It bears the name that it was asked for by.
    """
    folder = start_folder(prepared.recipe)
    if not (folder / "config.json").is_file():
        return None
    encoder = load_encoder(folder)
    encoder.config.name_or_path = prepared.start.config.name_or_path
    vars(encoder)["licence"] = prepared.start.licence
    return encoder.float().requires_grad_(False).eval()
