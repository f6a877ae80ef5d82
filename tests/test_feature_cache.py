"""Features by image out of a folder of stores.

Each encoded once, whatever sets it belongs to, and nothing of something else.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_encoder import fresh_encoder

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.evaluation import (
    FeatureStore,
    embed_images,
    extract_features,
    knn,
    manifest,
    search,
    standardise,
)
from mim_refiner_hf.evaluation.feature_cache import (
    ImageRows,
    check_features,
    evaluation_columns,
    read_rows,
)
from mim_refiner_hf.evaluation.knn import standardised_bank
from mim_refiner_hf.evaluation.linear_probe import linear_probe
from mim_refiner_hf.evaluation.low_shot import low_shot

make_encoder = partial(fresh_encoder, image_size=8, num_channels=1)

COLUMN = "block1.cls"


def digits(places: Any = range(60)) -> ImageDataset:
    return open_images("digits", num_channels=1).subset(list(places))


def read(
    encoder: MimRefinerModel,
    images: ImageDataset,
    folder: Path | None,
    columns: tuple[str, ...] = (COLUMN,),
) -> ImageRows:
    return read_rows(encoder, images, image_processor(encoder.config, {}), columns, features=folder)


def expected(encoder: MimRefinerModel, images: ImageDataset) -> torch.Tensor:
    return extract_features(encoder, images, image_processor(encoder.config, {})).features


def count_images(encoder: MimRefinerModel) -> list[int]:
    """A list that grows by the batch size at each forward pass."""
    passes: list[int] = []
    encoder.embeddings.register_forward_hook(
        lambda _module, inputs, _output: passes.append(len(inputs[0]))
    )
    return passes


def test_images_of_overlapping_sets_are_encoded_once_and_keep_their_order(tmp_path: Path) -> None:
    encoder, rng = make_encoder(), np.random.default_rng(0)
    sets = [
        digits(range(40)),
        digits(range(59, 19, -1)),
        digits(rng.permutation(60)[:30]),
        digits(range(60)),
    ]
    wanted = [expected(encoder, images) for images in sets]
    passes = count_images(encoder)
    for images, features in zip(sets, wanted, strict=True):
        rows = read(encoder, images, tmp_path / "features")
        torch.testing.assert_close(rows.column(COLUMN), features, atol=1e-5, rtol=0)
        assert rows.labels is not None and rows.labels.tolist() == images.labels.tolist()  # type: ignore[union-attr]
    assert sum(passes) == 60
    (store,) = (tmp_path / "features").iterdir()  # one, which grew
    assert len(list(store.glob("shards/*.parquet"))) == 2


def test_other_weights_and_columns_are_computed_and_kept_apart(tmp_path: Path) -> None:
    one, other = make_encoder(0), make_encoder(1)
    for encoder in (one, other, one, other):
        rows = read(encoder, digits(), tmp_path)
        torch.testing.assert_close(
            rows.column(COLUMN), expected(encoder, digits()), atol=1e-5, rtol=0
        )
    assert len(list(tmp_path.iterdir())) == 2
    passes = count_images(one)
    both = read(one, digits(), tmp_path, (COLUMN, "block1.mean"))
    assert sum(passes) == 60 and both.side_by_side([COLUMN, "block1.mean"]).shape == (60, 64)
    read(one, digits(), tmp_path, ("block1.mean",))
    assert sum(passes) == 60


def test_a_damaged_store_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = make_encoder()
    read(encoder, digits(), tmp_path)
    (shard,) = tmp_path.rglob("*.parquet")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(bytes(data))
    passes = count_images(encoder)
    features = read(encoder, digits(), tmp_path).column(COLUMN)
    assert sum(passes) == 60 and "is not what was written" in caplog.text
    torch.testing.assert_close(features, expected(encoder, digits()), atol=1e-5, rtol=0)


def test_an_interrupted_growth_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "IMAGES_PER_SHARD", 16)
    encoder = make_encoder()
    read(encoder, digits(range(20)), tmp_path)  # two shards
    passes = count_images(encoder)

    def stop(*_: Any) -> None:
        if len(passes) == 2:
            raise KeyboardInterrupt

    handle = encoder.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        read(encoder, digits(), tmp_path)
    handle.remove()
    (store,) = tmp_path.iterdir()
    assert len(list((store / "records").iterdir())) == 3

    features = read(encoder, digits(), tmp_path).column(COLUMN)
    assert sum(passes) == 16 + 16 + 24  # one batch was lost
    torch.testing.assert_close(features, expected(encoder, digits()), atol=1e-5, rtol=0)
    assert len(FeatureStore(store, range(5))) == 60 and sum(passes) == 56 + 60


def test_broken_images_have_no_row_and_are_not_tried_again(tmp_path: Path) -> None:
    encoder = make_encoder()
    for i in range(30):
        path = tmp_path / "photos" / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9), dtype=np.uint8)).save(
            path
        )
    images = open_images(str(tmp_path / "photos"), num_channels=1)
    bad = [4, 17]
    for place in bad:
        Path(images.describe(place)).write_bytes(b"no image")
    images = open_images(str(tmp_path / "photos"), num_channels=1)
    whole = [place for place in range(30) if place not in bad]
    for _ in range(2):
        rows = read(encoder, images, tmp_path / "features")
        assert rows.images.indices.tolist() == whole
        torch.testing.assert_close(
            rows.column(COLUMN), expected(encoder, images.subset(whole)), atol=1e-5, rtol=0
        )
        assert rows.labels is not None and rows.labels.tolist() == images.labels[whole].tolist()  # type: ignore[index]
    settings: dict[str, Any] = {"processor": image_processor(encoder.config, {}), "seed": 3}
    for protocol, more in (
        (low_shot, {"shots": (1, 5)}),
        (linear_probe, {"augment": False, "epochs": 3}),
    ):
        kept, memory = (
            protocol(
                encoder=encoder,
                train_images=train,
                eval_images=images.subset(whole),
                features=folder,
                **settings,
                **more,
            )  # type: ignore[operator]
            for train, folder in ((images, tmp_path / "features"), (images.subset(whole), None))
        )
        assert set(kept.scores) == set(memory.scores)
        if protocol is linear_probe:
            # two of 28 images: batches differ in rounding
            assert kept.metrics == pytest.approx(memory.metrics, abs=0.08)
    with pytest.raises(ValueError, match=r"none of the 2 images of .*photos can be read"):
        read(encoder, images.subset(bad), tmp_path / "features")


def test_protocols_say_the_same_with_and_without_a_store(tmp_path: Path) -> None:
    encoder = make_encoder()
    images = {"train_images": digits(range(300)), "eval_images": digits(range(300, 500))}
    settings: dict[str, Any] = {
        "encoder": encoder,
        "processor": image_processor(encoder.config, {}),
        **images,
    }
    for protocol, more in ((low_shot, {}), (linear_probe, {"augment": False, "epochs": 5})):
        memory = protocol(**settings, **more)  # type: ignore[operator]
        kept = protocol(**settings, **more, features=tmp_path)  # type: ignore[operator]
        # one or two images of 200: batches differ in rounding
        assert kept.metrics == pytest.approx(memory.metrics, abs=0.011)


@pytest.mark.parametrize("where", ["memory", "a store", "a store that grew out of order"])
def test_a_bank_is_searched_some_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    encoder, columns = make_encoder(), (COLUMN, "block1.mean", "block0.cls")
    folder = None if where == "memory" else tmp_path
    rows_of = FeatureStore.rows
    if "grew" in where:
        read(encoder, digits(range(3, 200, 7)), tmp_path, columns)
    # forwards, backwards and mixed: an index is that of a row of the bank, wherever it is stored
    for order in (range(200), range(199, -1, -1), np.random.default_rng(0).permutation(200)):
        images = digits(order)
        rows = read(encoder, images, folder, columns)
        bank = rows.side_by_side(columns)
        whole = torch.cat([rows.column(column) for column in columns], dim=1)
        assert bank.shape == whole.shape == (200, 96) and torch.equal(bank[:], whole)
        assert torch.equal(bank[37:80], whole[37:80])

        asked: list[int] = []

        def counted(
            store: FeatureStore, name: str, places: Any, asked: list[int] = asked
        ) -> torch.Tensor:
            asked.append(len(places))
            return rows_of(store, name, places)

        with monkeypatch.context() as patch:
            patch.setattr(search, "BANK_AT_ONCE", 48)
            patch.setattr(knn, "_ROWS_AT_ONCE", 48)
            patch.setattr(FeatureStore, "rows", counted)
            stored, shown = standardised_bank(bank, whole[:9])
            expected_bank, expected_shown = standardise(whole, whole[:9])
            assert torch.equal(shown, expected_shown)
            found = search.nearest(shown, stored, 7)
            expected = search.nearest(expected_shown, expected_bank, 7)
            classes = knn.knn_predict(stored, rows.labels, shown)
            alone = knn.knn_predict(expected_bank, rows.labels, shown)
        assert all(map(torch.equal, found, expected))
        assert torch.equal(*[answers[10, 0.07] for answers in (classes, alone)])
        assert max(asked, default=0) <= 48 and bool(asked) == (where != "memory")


def test_a_store_of_embed_serves_and_is_left_alone(tmp_path: Path) -> None:
    encoder = make_encoder()
    processor, columns = image_processor(encoder.config, {}), evaluation_columns(encoder.config)
    means = ["block0.mean", "block1.mean"]
    assert columns == ["block0.cls", "block1.cls", *means, "output.cls", "output.mean"]
    embed_images(encoder, digits(), processor, tmp_path / "all", columns=columns)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*")}
    passes = count_images(encoder)
    features = read(encoder, digits(range(50, 10, -1)), tmp_path / "all", tuple(columns)).column(
        COLUMN
    )
    assert not passes and before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*")
    }
    torch.testing.assert_close(
        features, expected(encoder, digits(range(50, 10, -1))), atol=1e-5, rtol=0
    )


def test_a_store_that_cannot_serve_says_why(tmp_path: Path) -> None:
    encoder = make_encoder()
    embed_images(
        encoder, digits(), image_processor(encoder.config, {}), tmp_path / "few", columns=[COLUMN]
    )
    with pytest.raises(
        ValueError,
        match=r"lacks the columns block0.cls, block1.mean and has block1.cls; .*pooling for cls "
        r"and mean",
    ):
        read(encoder, digits(), tmp_path / "few", ("block0.cls", COLUMN, "block1.mean"))
    with pytest.raises(ValueError, match="other features: encoder was unnamed"):
        read(make_encoder(1), digits(), tmp_path / "few")
    with pytest.raises(
        ValueError, match="lacks 40 of the 60 images of digits, such as row 60 of digits"
    ):
        read(encoder, digits(range(40, 100)), tmp_path / "few")
    (shard,) = (tmp_path / "few").rglob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="it is damaged"):
        read(encoder, digits(), tmp_path / "few")


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.layers[1].layer_scale2.register_forward_hook(
            lambda _module, _inputs, output: output * float("nan")
        )
    for folder in (tmp_path, None):
        with pytest.raises(
            ValueError,
            match=r"features block1.cls of 60 of 60 images are not finite.*row 0 of digits; check "
            r"the model",
        ):
            read(encoder, digits(), folder).column(COLUMN)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a folder of features"):
        check_features(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        check_features(tmp_path / "note.txt")
    check_features(tmp_path / "new")
