"""Data: every kind of source and image mode, the order of training, and a clear sentence for
everything that is not there.
"""

import io
import shutil
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_digits

from mim_refiner_hf.clustering.decoding import decode_image
from mim_refiner_hf.data import images as data
from mim_refiner_hf.data.images import ImageDataset, hold_out, open_images
from mim_refiner_hf.data.order import BatchSampler, epoch_order
from mim_refiner_hf.data.stream import open_stream

RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (16, 1))  # (16, 32), dark left to bright right


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(RAMP)).save(path, **options)
    return path


def encoded(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


# Decoding


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_greyscale_and_colour_become_what_is_asked(
    tmp_path: Path, channels: int, mode: str
) -> None:
    grey = decode_image(save(tmp_path / "a.png"), channels)
    assert grey.mode == mode and np.array_equal(np.array(grey.convert("L")), RAMP)
    colour = decode_image(
        save(tmp_path / "b.png", Image.new("RGB", (5, 4), (200, 30, 7))), channels
    )
    assert colour.mode == mode and colour.getpixel((0, 0)) == (
        (200, 30, 7) if channels == 3 else 78
    )


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    deep = RAMP.astype(np.uint16) * 257
    for path in (
        save(tmp_path / "a.png", Image.fromarray(deep)),
        save(tmp_path / "b.tiff", Image.fromarray(deep.astype(np.int32))),
    ):
        assert np.array_equal(np.array(decode_image(path, 1)), RAMP), path
    assert np.array_equal(np.array(decode_image(Image.fromarray(RAMP.astype(np.int32)), 1)), RAMP)
    assert np.array_equal(
        np.array(decode_image(Image.fromarray(RAMP.astype(np.float32) / 255), 1)), RAMP
    )
    assert np.array_equal(np.array(decode_image(Image.fromarray(RAMP.astype(np.float32)), 1)), RAMP)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[:, 0] = (255, 0, 0, 255)
    # garbage under full transparency
    rgba[:, 1] = (9, 9, 9, 0)
    rgba[:, 2] = (0, 0, 0, 51)
    expected = [(255, 0, 0), (255, 255, 255), (204, 204, 204)]
    assert [
        decode_image(save(tmp_path / "a.png", Image.fromarray(rgba))).getpixel((x, 0))
        for x in range(3)
    ] == expected
    grey = decode_image(save(tmp_path / "b.png", Image.fromarray(rgba).convert("LA")), 1)
    assert [grey.getpixel((x, 0)) for x in range(3)] == [76, 255, 204]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    image = decode_image(save(tmp_path / "c.gif", palette, transparency=1))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


def test_first_frame_cmyk_and_exif_rotation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    assert decode_image(
        save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    ).getpixel((0, 0)) == (
        255,
        0,
        0,
    )
    cmyk = decode_image(save(tmp_path / "b.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0))))
    assert np.abs(np.array(cmyk)[0, 0].astype(int) - (255, 0, 0)).max() <= 3
    exif = Image.Exif()
    # stored rotated: turn 90 degrees clockwise to view
    exif[0x0112] = 6
    turned = decode_image(save(tmp_path / "c.jpg", exif=exif, quality=100), 1)
    assert (
        turned.size == (16, 32)
        and np.abs(np.array(turned).astype(int) - np.rot90(RAMP, -1)).max() <= 3
    )


def test_what_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(save(tmp_path / "good.png").read_bytes()[:50])
    for source in (broken, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=f"Cannot decode .*{source.name}"):
            decode_image(source)
    with pytest.raises(ValueError, match="Cannot decode an image"):
        decode_image(b"")
    with pytest.raises(ValueError, match="num_channels is 17; images have 1 to 16"):
        decode_image(broken, 17)


# Opening


def test_digits_are_scikit_learns_stratified_and_fixed() -> None:
    train, test = (open_images("digits", split=split, num_channels=1) for split in (None, "test"))
    assert (len(train), len(test), train.num_classes, train.name) == (1297, 500, 10, "digits")
    every = np.concatenate(
        [
            np.stack([np.array(images[i].image) for i in range(len(images))])
            for images in (train, test)
        ]
    )
    source = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in every) == sorted(image.tobytes() for image in source)
    counts = np.stack([np.bincount(images.labels) for images in (train, test)])
    assert np.abs(counts[1] - counts.sum(0) * 500 / 1797).max() <= 1
    assert [train[i].label for i in range(20)] == train.labels[:20].tolist() and train[7].index == 7
    assert train.fingerprint == open_images("digits", split="train").fingerprint != test.fingerprint
    with pytest.raises(ValueError, match=r"no split 'val'; it has \['test', 'train'\]"):
        open_images("digits", split="val")


def test_folder_with_and_without_labels(tmp_path: Path) -> None:
    for name in (
        "b/x/2.PNG",
        "b/1.jpg",
        "a/3.webp",
        "a/.hidden.png",
        ".cache/4.png",
        "a/notes.txt",
    ):
        save(tmp_path / name, format="PNG")
    images = open_images(str(tmp_path))
    assert [Path(images.describe(i)).name for i in range(len(images))] == [
        "3.webp",
        "1.jpg",
        "2.PNG",
    ]
    assert (
        images.class_names == ["a", "b"]
        and images.labels.tolist() == [0, 1, 1]
        and images.num_classes == 2
    )
    before = images.fingerprint
    save(tmp_path / "0.png")
    images = open_images(str(tmp_path))
    assert (
        images.labels is None
        and images.class_names is None
        and images.num_classes == 0
        and images.fingerprint != before
    )
    assert [sample.label for sample in (images[0], images[3])] == [-1, -1]
    part = images.subset([3, 1]).subset([1])
    assert (
        part[0].index == 1
        and part.describe(0) == images.describe(1)
        and part.fingerprint != images.fingerprint
    )


def test_folder_with_splits(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        save(tmp_path / name)
    assert [
        len(open_images(str(tmp_path), split=split))
        for split in (None, "train", "val", "validation")
    ] == [2, 2, 1, 1]
    assert open_images(str(tmp_path)).class_names == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"no split \(sub-folder\) 'test'; it has \['train', 'val'\]"
    ):
        open_images(str(tmp_path), split="test")
    # now "train" is a kind of vehicle
    save(tmp_path / "bus/4.png")
    assert open_images(str(tmp_path)).class_names == ["bus", "train", "val"]


def test_parquet_file_and_folder(shared: Path) -> None:
    folder = shared / "data/cifar10"
    images = open_images(str(folder), split="test[:50]")
    file = open_images(str(folder / "test.parquet"), num_channels=1)
    assert len(images) == 50 and len(file) == 4000 and images.class_names[0] == "airplane"
    assert (
        np.bincount(file.labels).tolist() == [400] * 10
        and file.labels[:50].tolist() == images.labels.tolist()
    )
    row = datasets.Dataset.from_parquet(str(folder / "test.parquet"))[3]
    assert (
        np.array_equal(np.array(images[3].image), np.array(row["image"]))
        and images[3].label == row["label"]
    )
    assert file[0].image.mode == "L" and images.describe(3) == f"row 3 of {folder}"
    with pytest.raises(ValueError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        open_images(str(folder), split="val")


@pytest.mark.parametrize(
    ("label", "expected", "names"),
    [
        (["dog", "cat", None], [1, 0, -1], ["cat", "dog"]),
        ([4, 0, None], [4, 0, -1], None),
        ([-1, -1, -1], None, None),
        (None, None, None),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_tables_with_any_labels_and_bytes(
    tmp_path: Path, label: list | None, expected: list | None, names: list | None, raw: bool
) -> None:
    cells = [encoded(value) for value in (10, 20, 30)]
    columns = {
        "picture": cells if raw else [{"bytes": cell} for cell in cells],
        "note": ["x", "y", "z"],
    }
    table = datasets.Dataset.from_dict(columns | ({"label": label} if label else {}))
    table.to_parquet(tmp_path / "images.parquet")
    images = open_images(str(tmp_path / "images.parquet"))
    assert [images[i].image.getpixel((0, 0))[0] for i in range(3)] == [10, 20, 30]
    assert (
        images.labels if expected is None else images.labels.tolist()
    ) == expected and images.class_names == names
    table.save_to_disk(tmp_path / "saved")
    saved = open_images(str(tmp_path / "saved"))
    assert (
        len(saved) == 3
        and saved[2].image.getpixel((0, 0)) == (30, 0, 0)
        and saved[0].label == images[0].label
    )


def test_an_empty_cell_is_named_by_its_row(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [encoded(1), None]}).to_parquet(
        tmp_path / "images.parquet"
    )
    with pytest.raises(ValueError, match=r"Cannot decode row 1 of .*images\.parquet"):
        open_images(str(tmp_path / "images.parquet"))[1]


# Streams


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_stream_is_a_shuffle_of_the_table(shared: Path, tmp_path: Path, kind: str) -> None:
    path = shared / "data/gtsrb/test.parquet"
    if kind == "saved":
        datasets.Dataset.from_parquet(str(path)).save_to_disk(tmp_path)
        path = tmp_path
    images, stream = open_images(str(path)), open_stream(str(path))
    examples = list(stream.iterate(0, 0))
    assert [index for index, _ in examples] == list(
        range(len(images))
    ) and stream.class_names == images.class_names
    cells = [example["image"]["bytes"] for _, example in examples]
    stored = [images.found.sources[i] for i in range(len(images))]
    assert cells != stored and sorted(cells) == sorted(stored)
    image, label = stream.decode(examples[5][1])
    place = stored.index(cells[5])
    assert (
        np.array_equal(np.array(image), np.array(images[place].image))
        and label == images.labels[place]
    )
    # more passes: over parquet each ends with a wait of 5 s inside `datasets`
    if kind == "saved":
        assert all(
            [example["image"]["bytes"] for _, example in stream.iterate(*other)] != cells
            for other in ((0, 1), (1, 0))
        )


def test_stream_of_a_folder_and_of_tar_shards(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        save(tmp_path / "folder" / name)
    stream = open_stream(str(tmp_path / "folder"), num_channels=1)
    decoded = [stream.decode(example) for _, example in stream.iterate(0, 0)]
    assert sorted(label for _, label in decoded) == [0, 0, 1] and all(
        np.array_equal(np.array(image), RAMP) for image, _ in decoded
    )
    (tmp_path / "shards").mkdir()
    flat = tmp_path / "flat"
    for name, label in (("1", 5), ("2", 6)):
        save(flat / f"{name}.png")
        (flat / f"{name}.cls").write_text(str(label))
    shutil.make_archive(str(tmp_path / "shards" / "train-000"), "tar", flat)
    stream = open_stream(str(tmp_path / "shards"), num_channels=1)
    decoded = [stream.decode(example) for _, example in stream.iterate(0, 0)]
    assert sorted(label for _, label in decoded) == [5, 6] and np.array_equal(
        np.array(decoded[0][0]), RAMP
    )


# Order


def test_epoch_order_is_a_uniform_permutation_of_its_arguments() -> None:
    assert np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2)) and sorted(
        epoch_order(50, 1, 2)
    ) == list(range(50))
    orders = np.stack([epoch_order(20, seed, epoch) for seed in range(40) for epoch in range(50)])
    assert len({order.tobytes() for order in orders}) == len(orders)
    assert min(chisquare(np.bincount(orders[:, place])).pvalue for place in range(20)) > 1e-4


def test_batches_are_the_epoch_orders_cut_in_pieces() -> None:
    images = open_images("digits").subset(range(100, 123))
    sampler = BatchSampler(images, batch_size=6, seed=4, steps=8)
    orders = [epoch_order(23, 4, epoch).tolist() for epoch in range(3)]
    # each with those that may stand in for it: one batch later in the order, and the eight after
    # that
    expected = [
        (epoch, order[place], *(order[(place + 6 + more) % 23] for more in range(9)))
        for epoch, order in enumerate(orders)
        for place in range(18)
    ]
    batches = list(sampler)
    assert len(sampler) == 8
    assert [len(batch) for batch in batches] == [6] * 8 and list(chain(*batches)) == expected[:48]
    for start in range(9):
        later = BatchSampler(images, batch_size=6, seed=4, steps=8, start_step=start)
        assert list(later) == batches[start:] and len(later) == 8 - start
    shares = [
        list(BatchSampler(images, batch_size=6, seed=4, steps=8, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == batches


def test_stream_batches_go_through_epochs_and_start_anywhere(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [encoded(value) for value in range(11)]}).save_to_disk(
        tmp_path
    )
    stream = open_stream(str(tmp_path))
    options = {"batch_size": 4, "seed": 1, "steps": 9}
    batches = list(BatchSampler(stream, **options))
    # 11 examples: 2 batches of 4, and 3 more
    epochs = [list(stream.iterate(1, epoch)) for epoch in range(5)]
    # those that may stand in for an example: the next batch; where the stream ends in it, what is
    # left and this batch
    pools = [pool for examples in epochs for pool in (examples[4:8], examples[8:] + examples[4:8])]
    expected = [
        (step // 2, example, *(pools[step][(place + more) % len(pools[step])] for more in range(9)))
        for step in range(9)
        for place, example in enumerate(epochs[step // 2][step % 2 * 4 : step % 2 * 4 + 4])
    ]
    assert list(chain(*batches)) == expected
    for start in range(10):
        assert list(BatchSampler(stream, **options, start_step=start)) == batches[start:]
    shares = [list(BatchSampler(stream, **options, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == batches
    with pytest.raises(ValueError, match="ends before its first batch of 12 is full"):
        list(BatchSampler(stream, batch_size=12, seed=0, steps=1))


def test_batches_that_cannot_be_are_refused(tmp_path: Path) -> None:
    images = open_images("digits")
    with pytest.raises(
        ValueError, match="batch_size 2000 is larger than digits with its 1297 images"
    ):
        BatchSampler(images, batch_size=2000, seed=0, steps=1)
    with pytest.raises(ValueError, match=r"batch_size 10 .* multiple of their number, 4"):
        BatchSampler(images, batch_size=10, seed=0, steps=1, world_size=4)
    save(tmp_path / "only.png")
    with pytest.raises(ValueError, match="has 1 image; training needs at least 2"):
        BatchSampler(open_images(str(tmp_path)), batch_size=1, seed=0, steps=1)


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_hold_out_is_stratified_disjoint_and_fixed(fraction: float) -> None:
    images = open_images("digits")
    rest, held_out = hold_out(images, fraction, seed=1)
    places = [{images_[i].index for i in range(len(images_))} for images_ in (rest, held_out)]
    assert (
        len(held_out) == round(fraction * 1297)
        and places[0] | places[1] == set(range(1297))
        and not places[0] & places[1]
    )
    assert (
        np.abs(
            np.bincount(held_out.labels, minlength=10) - fraction * np.bincount(images.labels)
        ).max()
        <= 1
    )
    again, other = hold_out(images, fraction, seed=1)[1], hold_out(images, fraction, seed=2)[1]
    assert again.fingerprint == held_out.fingerprint != other.fingerprint


def test_hold_out_is_bounded_and_refuses_nonsense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for i in range(10):
        save(tmp_path / f"{i}.png")
    images = open_images(str(tmp_path))  # unlabelled
    assert [len(part) for part in hold_out(images, 0.01, 0)] == [9, 1] and [
        len(part) for part in hold_out(images, 0.99, 0)
    ] == [1, 9]
    monkeypatch.setattr(data, "MAX_HELD_OUT", 3)
    assert [len(part) for part in hold_out(images, 0.5, 0)] == [7, 3]
    for fraction in (0.0, 1.0, -1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            hold_out(images, fraction, 0)
    with pytest.raises(ValueError, match="has 1 image"):
        hold_out(images.subset([0]), 0.5, 0)


# What is not there


@pytest.mark.parametrize(
    "name",
    ["foo/bar/", "./foo", "/no/such", "foo.parquet", "photo.jpg", "a/b/c", "~/no-such-folder"],
)
@pytest.mark.parametrize("open_", [open_images, open_stream])
def test_a_missing_path_does_not_go_to_the_hub(name: str, open_: object) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"No file or folder .*: give a folder of images, a \.parquet file, 'digits'",
    ):
        open_(name)


def test_errors_say_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match=r"did you mean .*photos\?"):
        open_images(str(tmp_path / "fotos"))
    with pytest.raises(ValueError, match=r"No images in .*photos: looked .*\.jpeg"):
        open_images(str(tmp_path / "photos"))
    with pytest.raises(ValueError, match="one file and neither"):
        open_images(str(save(tmp_path / "one.png")))
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "text.parquet")
    for open_ in (open_images, open_stream):
        with pytest.raises(
            ValueError,
            match=r"No image column in .*text\.parquet: its columns are \['text', 'label'\]",
        ):
            open_(str(tmp_path / "text.parquet"))
    with pytest.raises(
        ConnectionError, match="No path 'owner/nothing' here, and the Hub cannot be reached"
    ):
        open_images("owner/nothing")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"Cannot open .*broken\.parquet"):
        open_images(str(tmp_path / "broken.parquet"))
    with pytest.raises(ValueError, match="not streamed"):
        open_stream("digits")

    def not_found(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/nothing' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset_builder", not_found)
    with pytest.raises(
        FileNotFoundError,
        match="No data set 'owner/nothing': not a path here, not 'digits', and not on the Hub",
    ):
        open_images("owner/nothing")


def test_a_data_set_travels_to_spawned_workers(tmp_path: Path) -> None:
    import pickle

    for i in range(3):
        save(tmp_path / f"{i}.png")
    copy: ImageDataset = pickle.loads(pickle.dumps(open_images(str(tmp_path)).subset([2])))
    assert len(copy) == 1 and copy[0].index == 2
