"""Two sets of images with classes of their own, against a join of their names by hand."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image

from mim_refiner_hf.data.classes import with_one_class_table
from mim_refiner_hf.data.images import ImageDataset, hold_out, open_images
from mim_refiner_hf.evaluation import cluster_accuracy, knn_accuracy, rankme
from mim_refiner_hf.evaluation.knn import knn_predict

PICTURE = Image.new("RGB", (8, 8))
ANIMALS = ["cat", "cow", "dog", "hen", "pig"]


def images_of(labels: Sequence[Any], names: list[str] | None = None) -> ImageDataset:
    """A `datasets.Dataset` with these labels; `names` state what their numbers mean."""
    features = datasets.Features({"image": datasets.Image()})
    if names is not None:
        features["label"] = datasets.ClassLabel(names=names)
        table = datasets.Dataset.from_dict(
            {"image": [PICTURE] * len(labels), "label": labels}, features=features
        )
    else:
        table = datasets.Dataset.from_dict({"image": [PICTURE] * len(labels), "label": labels})
        table = table.cast_column("image", datasets.Image())
    return open_images(table)


def words(images: ImageDataset) -> list[str]:
    """The name of every image's class."""
    assert images.labels is not None
    if images.class_names is None:
        return [str(label) for label in images.labels]
    return [images.class_names[label] for label in images.labels]


subsets = st.lists(st.sampled_from(ANIMALS), min_size=1, max_size=8)


@given(subsets, subsets, st.permutations(ANIMALS), st.permutations(ANIMALS), st.booleans())
def test_numbers_mean_the_same_names(
    first: list[str], second: list[str], one: list[str], other: list[str], stated: bool
) -> None:
    """Each set numbers its classes by its own words, or states them in an order of its own."""

    def opened(labels: list[str], order: list[str]) -> ImageDataset:
        if not stated:
            return images_of(labels)
        return images_of([order.index(label) for label in labels], order)

    bank, evaluated = opened(first, one), opened(second, other)
    if not set(first) & set(second):
        with pytest.raises(ValueError, match="no class in common"):
            with_one_class_table(bank, evaluated)
        return
    bank, evaluated = with_one_class_table(bank, evaluated)
    assert words(bank) == first and words(evaluated) == second
    assert bank.labels is not None and evaluated.labels is not None
    for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second)):
        assert (bank.labels[i] == evaluated.labels[j]) == (a == b)


def test_folders_without_a_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, kinds in (("train", "cat cow dog"), ("test", "walrus cow dog")):
        for kind in kinds.split():
            (tmp_path / split / kind).mkdir(parents=True)
            PICTURE.save(tmp_path / split / kind / "a.png")
    bank, evaluated = (open_images(tmp_path / split) for split in ("train", "test"))
    bank, evaluated = with_one_class_table(bank, evaluated)
    assert words(bank) == ["cat", "cow", "dog"] and words(evaluated) == ["cow", "dog", "walrus"]
    assert "has no image of 1 of the classes to tell apart (walrus): 1 images" in caplog.text


@pytest.mark.parametrize(
    ("bank", "evaluated"),
    [
        # words that are numbers, and numbers
        (images_of(["3", "7", "7"]), images_of([7, 3])),
        (images_of(["3", "7", "7"]), images_of([7, 3, 12])),
        (images_of([0, 7, 12]), images_of(["7", "12"])),
        # numbers that a data set states names for
        (images_of([0, 2, 1], ["a", "b", "c"]), images_of([2, 0])),
        (images_of([2, 0]), images_of([0, 2, 1], ["a", "b", "c"])),
    ],
)
def test_names_on_one_side(bank: ImageDataset, evaluated: ImageDataset) -> None:
    first, second = with_one_class_table(bank, evaluated)
    assert first.class_names == second.class_names
    assert set(words(first)) & set(words(second))
    if bank.class_names == ["a", "b", "c"]:
        assert words(second) == ["c", "a"]


def test_numbers_that_mean_no_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are names .cat, dog., .* numbers .0, 1."):
        with_one_class_table(images_of(["cat", "dog"]), images_of([0, 1]))
    with pytest.raises(ValueError, match=r"numbers .0, 5."):
        with_one_class_table(images_of([0, 5]), images_of([0, 1], ["a", "b"]))
    with pytest.raises(ValueError, match=r"names .01, 02."):
        with_one_class_table(images_of([1, 2]), images_of(["01", "02"]))


def test_plain_numbers_stay_what_they_are() -> None:
    bank, evaluated = images_of([0, 1, 2]), images_of([2, 1])
    assert with_one_class_table(bank, evaluated) == (bank, evaluated)


def test_large_numbers_are_no_size_of_a_table() -> None:
    bank, evaluated = with_one_class_table(images_of([10**12, 5, 5]), images_of([5, 10**12]))
    assert bank.num_classes == evaluated.num_classes == 2
    assert words(bank) == ["1000000000000", "5", "5"]
    assert words(evaluated) == ["5", "1000000000000"]
    rows = torch.eye(3)
    answers = knn_predict(rows, torch.tensor([10**12, 5, 5]), rows, k=[1])
    assert next(iter(answers.values())).tolist() == [10**12, 5, 5]


@pytest.mark.parametrize("none", [None, -1, np.nan, -100])
def test_images_without_a_label_are_left_out_and_counted(
    none: Any, caplog: pytest.LogCaptureFixture
) -> None:
    labels = [none if place % 5 == 0 else place % 3 for place in range(30)]
    bank, _ = with_one_class_table(images_of(labels), images_of([0, 1, 2]))
    assert len(bank) == 24 and bank.labels is not None and (bank.labels >= 0).all()
    assert "6 of 30 images of" in caplog.text and "those of the other 24" in caplog.text


@pytest.mark.parametrize(("bank_labels", "labels"), [(9, 5), (12, 1), (0, 5), (12, 0)])
def test_few_labels_are_no_reason_to_refuse(
    bank_labels: int, labels: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A run on photos of which some happen to be labelled is one on photos."""
    images = images_of([0] * bank_labels + [-1] * 30 + [0] * labels)
    places = np.arange(len(images))
    bank, evaluated = with_one_class_table(
        images.subset(places[: bank_labels + 15]), images.subset(places[bank_labels + 15 :])
    )
    assert bank.labels is None and evaluated.labels is None
    assert len(bank) == bank_labels + 15 and len(evaluated) == 15 + labels
    assert "too few: nothing is measured by labels" in caplog.text


def test_one_class_is_not_measured_by_labels(caplog: pytest.LogCaptureFixture) -> None:
    """All photos lie in one sub-folder: any encoder would have 100 %."""
    rest, held_out = with_one_class_table(*hold_out(images_of(["DCIM"] * 40), 0.2, seed=0))
    assert rest.labels is None and held_out.labels is None and len(held_out) == 8
    assert "are of one class, DCIM: nothing is measured by labels" in caplog.text


def test_one_image_a_class_is_not_measured_by_labels(caplog: pytest.LogCaptureFixture) -> None:
    images = images_of(list(range(40)))
    rest, held_out = with_one_class_table(*hold_out(images, 0.2, seed=0))
    assert rest.labels is None and held_out.labels is None and len(held_out) == 8
    assert "no class of" in caplog.text and "is in both parts" in caplog.text


def test_empty_words_are_no_labels() -> None:
    images = images_of(["cat", "", "dog", None, "  ", "\t\n"])
    assert images.labels is not None and images.labels.tolist() == [0, -1, 1, -1, -1, -1]
    assert images.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([True, False], [1, 0]),
        ([1.0, float("nan")], [1, -1]),
        ([2.0, 0.0], [2, 0]),
    ],
)
def test_labels_of_other_types(labels: list[Any], expected: list[int]) -> None:
    assert images_of(labels).labels.tolist() == expected  # type: ignore[union-attr]


def test_a_column_that_holds_no_classes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert images_of([0.25, 0.5]).labels is None
    assert "column label has the label 0.25" in caplog.text


def test_labels_on_one_side_are_said(caplog: pytest.LogCaptureFixture) -> None:
    plain = open_images([PICTURE, PICTURE])
    assert with_one_class_table(images_of([0, 1]), plain)[1] is plain
    assert "nothing is measured by labels" in caplog.text


def test_held_out_images_keep_their_numbers() -> None:
    rest, held_out = hold_out(images_of([0, 1, 2] * 10), 0.3, seed=0)
    assert with_one_class_table(rest, held_out) == (rest, held_out)


# --- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_knn_of_other_types_is_that_of_single_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 60 + 6 * torch.randn(10, 64, generator=generator)
    labels = torch.arange(400) % 10
    rows = [(centres[labels] + torch.randn(400, 64, generator=generator)) for _ in range(2)]
    stored = [part.to(dtype) for part in rows]
    expected = knn_accuracy(stored[0].float(), labels, stored[1].float(), labels)
    assert knn_accuracy(stored[0], labels, stored[1], labels) == expected > 0.95
    small = labels.to(torch.uint8)
    assert knn_accuracy(stored[0], small, stored[1], small) == expected


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_not_finite_are_refused(wrong: float, side: int) -> None:
    rows = [torch.randn(30, 4) for _ in range(2)]
    rows[side][[3, 7], 2] = wrong
    labels = torch.arange(30) % 3
    with pytest.raises(ValueError, match="2 of 30 rows hold NaN or infinity, the first is row 3"):
        knn_accuracy(rows[0], labels, rows[1], labels)
    with pytest.raises(ValueError, match="row 3"):
        rankme(rows[side])


def test_rows_that_are_in_the_bank_too_are_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, others = (torch.randn(50, 16, generator=generator) for _ in range(2))
    labels = torch.arange(50) % 5
    for shown in (others, torch.cat([others, bank[:7]]), torch.cat([others, bank[:7].half()])):
        for ask in (knn_predict, knn_accuracy):
            caplog.clear()
            classes = torch.arange(len(shown)) % 5
            rest = (classes,) if ask is knn_accuracy else {}
            ask(bank, labels, shown, *rest)
            told = [record.message for record in caplog.records]
            assert len(told) == (len(shown) > len(others))
            assert all("7 of 57 rows to classify are in the bank too" in line for line in told)

    caplog.clear()
    knn_predict(bank, labels, bank, say_known=False)
    assert caplog.text == ""


@pytest.mark.parametrize("width", [1, 2, 3])
def test_other_rows_of_the_same_direction_are_not_taken_for_known(
    width: int, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, others = (torch.randn(400, width, generator=generator) for _ in range(2))
    knn_accuracy(bank, torch.arange(400) % 4, others, torch.arange(400) % 4)
    # where one channel is far larger than the others
    large = torch.tensor([1e6, *[1.0] * 7])
    bank, others = (large + torch.randn(400, 8, generator=generator) for _ in range(2))
    knn_predict(bank, torch.arange(400) % 4, others)
    assert caplog.text == ""


def test_what_k_nn_cannot_tell_is_said_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    bank, classes, shown, right = rows[:40], labels[:40], rows[40:], labels[40:]

    with pytest.raises(ValueError, match="too large to standardise"):
        knn_accuracy(1e25 * bank, classes, 1e25 * shown, right)
    with pytest.raises(ValueError, match=r"a label is 1\.5"):
        knn_accuracy(bank, classes, shown, torch.full((20,), 1.5))
    for temperature in (float("nan"), 0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive"):
            knn_accuracy(bank, classes, shown, right, temperature=temperature)
    assert caplog.text == ""

    for scale in (0.0, 1e-25, 1e-8):
        caplog.clear()
        knn_accuracy(scale * bank, classes, scale * shown, right)
        assert "hardly differ" in caplog.text
    caplog.clear()
    knn_accuracy(bank, classes, shown, torch.where(right == 1, 7, right))
    assert f"{int((right == 1).sum())} of 20 rows to classify are of a class that no" in caplog.text


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_the_rank_of_features_does_not_depend_on_their_scale(scale: float) -> None:
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    assert rankme(scale * rows) == pytest.approx(rankme(rows), rel=1e-4)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_groups_that_are_no_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="assignments hold NaN"):
        cluster_accuracy([0, 1, 1], [0, wrong, 1])
    with pytest.raises(ValueError, match=r"a label is 0\.5"):
        cluster_accuracy([0, 0.5, 1], [0, 0, 1])


def test_a_bank_of_one_row_gives_its_class() -> None:
    row, labels = torch.randn(1, 4), torch.tensor([3])
    assert knn_accuracy(row, labels, torch.randn(4, 4), torch.tensor([3, 3, 3, 1]), k=1) == 0.75


def test_arrays_score_as_tensors_do() -> None:
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    tensors = rows[:30], labels[:30], rows[30:], labels[30:]
    expected = knn_accuracy(*tensors)
    assert knn_accuracy(*(tensor.numpy() for tensor in tensors)) == expected
    assert rankme(rows.numpy()) == rankme(rows)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2), ()])
def test_what_is_no_table_of_features_is_refused(shape: tuple[int, ...]) -> None:
    wrong, labels = torch.zeros(shape), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"features must be"):
        rankme(wrong)
    with pytest.raises(ValueError, match=r"must be|needs at least|label"):
        knn_accuracy(torch.zeros(4, 4), labels, wrong, labels[: shape[0] if shape else 1], k=1)


def test_features_of_two_widths_are_refused() -> None:
    labels = torch.arange(4)
    with pytest.raises(ValueError, match=r"of one width, not \(4, 4\) and \(4, 3\)"):
        knn_accuracy(torch.eye(4), labels, torch.eye(4)[:, :3], labels, k=1)
