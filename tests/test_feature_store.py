"""The feature store: what is in it, from a table or a stream, the command that writes it, and wrong
use.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_store import (
    BATCH,
    COUNT,
    SHARD,
    contents,
    embed,
    make_encoder,
    make_processor,
    write_photos,
)
from torch import Tensor

import mim_refiner_hf
from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.cli import main
from mim_refiner_hf.data.found import SourceOptions
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.data.stream import open_stream
from mim_refiner_hf.evaluation import (
    FeatureStore,
    embed_images,
    extract_features,
    feature_columns,
    shard_files,
)
from mim_refiner_hf.evaluation.int8 import Int8Linear, computed_in, in_int8
from mim_refiner_hf.publishing.hub import save_model_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model_folder(folder, make_encoder(), make_processor())
    return str(folder)


# --- as a data set --------------------------------------------------------------------------------


def test_a_data_set_finds_neighbours_as_a_full_search_does(photos: Path, tmp_path: Path) -> None:
    store = embed(photos, tmp_path / "store", columns=["block1.cls", "block3.cls"])
    found = store.as_dataset("block3.cls")
    assert found.column_names == ["index", "path", "label", "embedding"]
    assert found.features["label"].names == ["cat", "dog"]
    assert found["path"][:] == store.paths and found["label"][:] == store.labels.tolist()

    rows = store.features("block3.cls")
    embedding = found.with_format("numpy")["embedding"][:]
    assert np.array_equal(embedding, rows.numpy())
    found.add_faiss_index("embedding")
    for query in (0, 11, COUNT - 1):
        _, nearest = found.get_nearest_examples("embedding", rows[query].numpy(), k=4)
        expected = torch.cdist(rows[query : query + 1], rows)[0].topk(4, largest=False).indices
        assert nearest["index"] == store.indices[expected].tolist()

    with pytest.raises(ValueError, match=r"has no column 'block9\.cls'; it has block1\.cls"):
        store.as_dataset("block9.cls")


# --- what is in it --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_columns_equal_hooked_block_outputs(photos: Path, tmp_path: Path, num_workers: int) -> None:
    encoder, images = make_encoder(), open_images(str(photos))
    columns = ["block1.cls", "block3.cls", "block3.mean", "last4.mean", "output.cls"]
    store = embed(
        photos, tmp_path / "out", encoder, columns=columns, loading=Loading(BATCH, num_workers)
    )
    blocks: list[Tensor] = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: blocks.append(output))
    with torch.no_grad():
        output = encoder(
            **make_processor()([images[i].image for i in range(COUNT)], return_tensors="pt")
        ).last_hidden_state
    expected = {
        "block1.cls": blocks[1][:, 0],
        "block3.cls": blocks[3][:, 0],
        "block3.mean": blocks[3][:, 1:].mean(dim=1),
        "last4.mean": torch.cat([tokens[:, 1:].mean(dim=1) for tokens in blocks], dim=1),
        "output.cls": output[:, 0],
    }
    assert store.columns == {name: features.shape[1] for name, features in expected.items()}
    for name, features in expected.items():
        torch.testing.assert_close(store.features(name), features, atol=1e-5, rtol=0)
    assert len(store) == COUNT and not store.broken
    assert store.labels.tolist() == [0] * 12 + [1] * 11 and store.class_names == ["cat", "dog"]
    assert store.indices.tolist() == list(range(COUNT))
    assert store.paths == [str(path) for path in sorted(photos.rglob("*.png"))]


def test_other_parquet_readers_see_the_same(photos: Path, tmp_path: Path) -> None:
    store = embed(photos, tmp_path / "out", columns=["block3.cls", "output.mean"])
    table = pq.read_table(tmp_path / "out" / "shards", columns=["output.mean", "label"])
    assert np.array_equal(
        np.stack(table["output.mean"].to_numpy()), store.features("output.mean").numpy()
    )
    assert table["label"].to_pylist() == store.labels.tolist()
    files = sorted(map(str, (tmp_path / "out" / "shards").iterdir()))
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["block3.cls"].length == 32
    assert torch.equal(torch.tensor(loaded["block3.cls"][:]), store.features("block3.cls"))


def test_a_store_holds_what_is_extracted(photos: Path, tmp_path: Path) -> None:
    encoder, images = make_encoder(), open_images(str(photos))
    expected = extract_features(
        encoder, images, make_processor(), blocks=[2, 0], loading=Loading(8)
    )
    columns = [f"block{block}.cls" for block in (0, 2, 3)]
    store = embed(
        photos, tmp_path / "out", encoder, columns=columns, loading=Loading(8), shard_size=COUNT
    )
    assert torch.equal(store.features("block3.cls"), expected.features)
    for block, features in expected.blocks.items():
        assert torch.equal(store.features(f"block{block}.cls"), features)
    assert expected.labels is not None and torch.equal(store.labels, expected.labels)


def test_a_store_without_cls_and_labels(photos: Path, tmp_path: Path) -> None:
    encoder, images = make_encoder(use_cls_token=False), open_images(str(photos / "cat"))
    store = embed_images(encoder, images, make_processor(), tmp_path / "out")
    assert (store.labels == -1).all() and list(store.columns) == ["block3.mean"]
    torch.testing.assert_close(
        store.features("block3.mean"), extract_features(encoder, images, make_processor()).features
    )


def test_bf16_is_computed_in_bf16_and_kept_exactly(photos: Path, tmp_path: Path) -> None:
    encoder = make_encoder().to(torch.bfloat16)
    store = embed(photos, tmp_path / "out", encoder)
    features = store.features("block3.cls")
    assert store.manifest["dtype"] == "bfloat16" and features.dtype == torch.float32
    assert torch.equal(features, features.bfloat16().float())
    exact = embed(photos, tmp_path / "fp32").features("block3.cls")
    assert 0 < (features - exact).norm() < 0.03 * exact.norm()


# --- in int8 --------------------------------------------------------------------------------------


def rounded(values: Tensor) -> Tensor:
    """Each row (..., D) in whole numbers up to 127 of a step of its own, in double precision."""
    exact = values.detach().double()
    step = exact.abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(exact / step) * step


def by_hand(linear: torch.nn.Linear, tokens: Tensor) -> Tensor:
    """What a linear layer gives for rounded tokens and weights."""
    product = rounded(tokens) @ rounded(linear.weight).T
    return (product + linear.bias.double()).float()


@pytest.mark.parametrize("shape", [(1, 48), (3, 300, 48), (257, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_int8(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear, tokens = torch.nn.Linear(48, 20, bias=bias), torch.randn(shape)
    tokens[..., 3] *= 50  # one large channel
    if bias:
        expected = by_hand(linear, tokens)
    else:
        expected = (rounded(tokens) @ rounded(linear.weight).T).float()
    with torch.inference_mode():
        torch.testing.assert_close(Int8Linear(linear)(tokens), expected, atol=1e-4, rtol=1e-4)
        assert not Int8Linear(linear)(torch.zeros(2, 48)).sub(linear(torch.zeros(2, 48))).any()
        # neither hidden nor spread: features that are not finite are refused
        tokens[..., 0, 5] = torch.nan
        assert Int8Linear(linear)(tokens)[..., 0, :].isnan().all()


def test_int8_is_what_rounding_by_hand_gives(photos: Path, tmp_path: Path) -> None:
    encoder = make_encoder()
    store = embed(photos, tmp_path / "out", in_int8(encoder))
    features = store.features("block3.cls")
    assert store.manifest["dtype"] == "int8"
    exact = embed(photos, tmp_path / "fp32", encoder).features("block3.cls")

    for module in encoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = partial(by_hand, module)  # type: ignore[method-assign]
    expected = embed(photos, tmp_path / "by hand", encoder).features("block3.cls")
    # a few values lie so near a half that they are rounded the other way
    off = (features - expected).norm()
    assert 0 < (features - exact).norm() < 0.03 * exact.norm()
    assert off < 0.1 * (features - exact).norm()


def test_an_encoder_in_int8_is_a_copy_and_vectors_do_not_depend_on_the_batch() -> None:
    encoder = make_encoder().eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    quick = in_int8(encoder)
    assert computed_in(quick) == "int8" and computed_in(encoder) == "float32"
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    pixels = torch.randn(5, 3, *encoder.config.image_hw)
    with torch.inference_mode():
        whole = quick(pixels).pooler_output
        torch.testing.assert_close(quick(pixels[3:4]).pooler_output, whole[3:4])


def spoilt() -> MimRefinerModel:
    """A model with a weight so large that all others of its output are rounded to nothing.

    It reads a channel that is always zero, so in fp32 it is without effect.
    """
    encoder = make_encoder()
    with torch.no_grad():
        for layer in encoder.layers:
            layer.norm2.weight[0] = layer.norm2.bias[0] = 0.0
            layer.mlp.fc1.weight[:, 0] = 1e5
    return encoder


def test_int8_that_spoils_an_encoder_is_refused_with_the_number(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model_folder(tmp_path / "model", spoilt(), make_processor())
    words = [str(tmp_path / "model"), "--dataset", str(photos), "--dtype", "int8"]
    for command, out in (("embed", "--out"), ("cluster", "--out"), ("evaluate", "--output_dir")):
        folder = tmp_path / command
        assert main([command, *words, out, str(folder), "--num_workers", "0"]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(
            r"--dtype int8: on the first \d+ images the cosine of int8 with fp32 features is down "
            r"to -?0\.\d{5}, below 0\.999; int8 spoils this encoder, use bf16 or fp32",
            said,
        )
        assert not folder.exists()


@pytest.mark.parametrize("least", [0.5, 1.1])
def test_auto_takes_int8_where_the_encoder_stands_it(
    least: float,
    model: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stated = {"avx512_bf16": False, "avx512_vnni": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: stated, raising=False)
    monkeypatch.setattr("mim_refiner_hf.runs.embed._LEAST_COSINE", least)
    exact = mim_refiner_hf.embed(model, photos)
    capsys.readouterr()
    vectors = mim_refiner_hf.embed(model, photos, dtype="auto")
    said = capsys.readouterr().out
    assert "auto'" in said and "int8, as this cpu computes int8, and bfloat16 not" in said
    assert np.array_equal(vectors, exact) == (least > 1)
    spoiled = "fp32, for on the first" in said and "below 1.1" in said
    assert spoiled == (least > 1)


def test_commands_in_int8(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    words = ["embed", model, "--dataset", str(photos), "--out", str(out), "--num_workers", "0"]
    words += ["--blocks", "0", "1", "2", "3", "--dtype"]
    assert main([*words, "int8"]) == 0
    said = f"--dtype int8: on the first {COUNT} images the cosine of int8 with fp32 features is at"
    assert said in capsys.readouterr().out
    store = FeatureStore(out)
    assert store.manifest["dtype"] == "int8"
    assert main([*words, "auto"]) == 0
    assert "--dtype auto: int8, as the features that are there" in capsys.readouterr().out
    assert main([*words, "fp32"]) == 2
    assert "dtype was int8, is float32" in capsys.readouterr().err

    # the same in memory, and what the other two commands compute
    features = store.features("block3.cls").numpy()
    vectors = mim_refiner_hf.embed(model, photos, dtype="int8")
    np.testing.assert_allclose(vectors, features, atol=1e-4)
    groups = mim_refiner_hf.cluster(photos, model, num_clusters=2, dtype="int8")
    np.testing.assert_allclose(groups.features, features, atol=1e-4)
    with pytest.raises(ValueError, match="dtype='int8': is for images"):
        mim_refiner_hf.cluster(vectors, dtype="int8")

    report = mim_refiner_hf.evaluate(model, photos, dtype="int8", features=tmp_path / "kept")
    exact = mim_refiner_hf.evaluate(model, photos)
    assert report["protocol"]["dtype"] == "int8"
    assert report["fingerprints"] == exact["fingerprints"]
    assert report["after"]["rankme"] != exact["after"]["rankme"]
    assert report["after"]["rankme"] == pytest.approx(exact["after"]["rankme"], rel=0.02)
    (kept,) = (tmp_path / "kept").glob("*/manifest.json")
    assert json.loads(kept.read_text())["dtype"] == "int8"
    with pytest.raises(ValueError, match="dtype='int8': protocols='fine_tuning' has none of that"):
        mim_refiner_hf.evaluate(model, photos, dtype="int8", protocols=["fine_tuning"])
    with pytest.raises(ValueError, match=r"dtype='auto': .* in int8, which is for a CPU"):
        mim_refiner_hf.embed(model, photos, out=out, dtype="auto", device="cuda")


@pytest.mark.parametrize("name", ["embed", "cluster", "evaluate"])
def test_a_wrong_dtype_is_refused_before_a_model_is_loaded(
    name: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = partial(getattr(mim_refiner_hf, name), images=photos, model="gone.pth")
    with pytest.raises(ValueError, match="dtype='int4': must be one of auto, fp32, bf16, int8"):
        call(dtype="int4")
    monkeypatch.setattr(f"mim_refiner_hf.runs.{name}.device_here", lambda: "cuda")
    with pytest.raises(ValueError, match="dtype='int8': is for a CPU, and this computes on cuda"):
        call(dtype="int8")


def test_int8_of_broken_weights_names_them(photos: Path) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.layers[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not a number; the model's weights are broken"):
        mim_refiner_hf.embed(encoder, photos, dtype="int8")


def test_names_of_columns() -> None:
    config = make_encoder().config
    assert feature_columns(config) == ["block3.cls"]
    assert feature_columns(config, [1, "output"], ["cls", "mean"], last4=True) == [
        f"{place}.{pooling}"
        for place in ("block1", "output", "last4")
        for pooling in ("cls", "mean")
    ]
    capi = make_encoder(
        use_cls_token=False,
        num_register_tokens=4,
        position_encoding="rope",
        predictor_layers=1,
        pooling="global_repr",
    ).config
    assert feature_columns(capi) == ["output.global_repr"]
    assert feature_columns(capi, [1], last4=True) == ["block1.mean", "last4.mean"]


# --- streams and memory ---------------------------------------------------------------------------


def test_a_stream_gives_what_the_table_gives(photos: Path, tmp_path: Path) -> None:
    encoded: list[bytes] = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    encoded[7] = b"no picture"
    labels = datasets.ClassLabel(names=["cat", "dog"])
    table = datasets.Dataset.from_dict(
        {"image": encoded, "label": [i % 2 for i in range(COUNT)]}
    ).cast_column("label", labels)
    table.to_parquet(tmp_path / "train.parquet")
    settings: dict[str, Any] = {
        "shard_size": SHARD,
        "loading": Loading(BATCH),
        "columns": ["block3.cls", "block0.mean"],
    }
    stores = []
    for name, opened in (("table", open_images), ("stream", open_stream)):
        images = opened(str(tmp_path / "train.parquet"))
        stores.append(
            embed_images(make_encoder(), images, make_processor(), tmp_path / name, **settings)
        )
    table_store, stream_store = stores
    assert all(
        torch.equal(table_store.features(column), stream_store.features(column))
        for column in settings["columns"]
    )
    for store in stores:
        assert store.indices.tolist() == [i for i in range(COUNT) if i != 7]
        assert store.labels.tolist() == [
            i % 2 for i in range(COUNT) if i != 7
        ] and store.class_names == ["cat", "dog"]
        assert [image["index"] for image in store.broken] == [7] and store.manifest[
            "num_images"
        ] == COUNT


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_words_of_a_stream_are_numbered(photos: Path, tmp_path: Path, kind: str) -> None:
    """Each image keeps its class by name, whoever had read the stream before, with labels left out.

    Damaged shards are computed again with the same numbers.
    """
    encoded = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    words = [["zebra", "ant", "", "cow", None][place % 5] for place in range(COUNT)]
    table = datasets.Dataset.from_dict({"image": encoded, "species": words})
    options = SourceOptions(label_column="species")
    source = tmp_path / "data"
    if kind == "saved":
        table.save_to_disk(source)
    else:
        source.mkdir()
        table.to_parquet(source / "train.parquet")

    stores = []
    for name, opened in (("table", open_images), ("stream", open_stream), ("stream", open_stream)):
        images = opened(str(source), options=options)
        folder = tmp_path / name
        for damaged in (folder / "shards").glob("00001.parquet"):
            damaged.write_bytes(b"")
        loading = Loading(BATCH)
        stores.append(
            embed_images(
                make_encoder(), images, make_processor(), folder, shard_size=SHARD, loading=loading
            )
        )
    for store in stores:
        assert store.class_names is not None and sorted(store.class_names) == [
            "ant",
            "cow",
            "zebra",
        ]
        named = [store.class_names[label] if label >= 0 else None for label in store.labels]
        assert named == [word or None for word in words]


def test_a_stream_says_what_labels_nothing(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores are no classes, and a column of nulls beside another is named."""
    encoded = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    nulls: list[Any] = [None] * COUNT
    for labels, says in (
        ({"label": [0.5] * COUNT}, "column label has the label 0.5; .* count as unlabelled"),
        ({"label": nulls, "labels": [1] * COUNT}, "its column label; it also has labels: name one"),
    ):
        features = {"image": datasets.Value("binary"), "labels": datasets.Value("int64")}
        features = {name: kind for name, kind in features.items() if name in {"image", *labels}}
        table = datasets.Dataset.from_dict(
            {"image": encoded, **labels},
            features=datasets.Features({**features, "label": datasets.Value("float64")}),
        )
        folder = tmp_path / str(len(labels))
        table.save_to_disk(folder / "data")
        caplog.clear()
        stream = open_stream(str(folder / "data"))
        store = embed_images(make_encoder(), stream, make_processor(), folder / "features")
        assert len(store) == COUNT and set(store.labels.tolist()) == {-1}
        assert len(re.findall(says, caplog.text)) == 1
        # in training too
        examples = list(stream.iterate(0, 0))
        assert len(examples) == COUNT and {stream.decode(each)[1] for _, each in examples} == {-1}


def test_training_tells_the_words_of_a_stream_apart(tmp_path: Path, photos: Path) -> None:
    encoded = [path.read_bytes() for path in sorted(photos.rglob("*.png"))][:6]
    words = ["a", "b", "", "a", "b", "c"]
    datasets.Dataset.from_dict({"image": encoded, "label": words}).save_to_disk(tmp_path / "data")
    numbers: dict[str, set[int]] = {}
    for epoch in range(2):
        stream = open_stream(str(tmp_path / "data"))
        for _, example in stream.iterate(0, epoch):
            numbers.setdefault(example["label"], set()).add(stream.decode(example)[1])
    assert numbers.pop("") == {-1}
    assert {len(of_word) for of_word in numbers.values()} == {1}
    assert len(set.union(*numbers.values())) == 3


def test_reading_takes_bounded_memory(tmp_path: Path) -> None:
    shards, rows, width = 2, 16384, 256  # 34 MB, 17 MB a shard
    manifest = {
        "format": shard_files.STORE_FORMAT,
        "num_images": shards * rows,
        "shard_size": rows,
        "class_names": None,
    }
    (tmp_path / "manifest.json").write_text(
        json.dumps({**manifest, "columns": {"block0.cls": width}, "command": None})
    )
    values = np.random.default_rng(0).standard_normal((shards * rows, width), dtype=np.float32)
    for shard in range(shards):
        part = values[shard * rows : (shard + 1) * rows]
        numbers = range(shard * rows, (shard + 1) * rows)
        paths = [str(i) for i in numbers]
        columns = {"block0.cls": part}
        content = shard_files.ShardRows(list(numbers), [-1] * rows, paths, columns)
        shard_files.write_shard(tmp_path, shard, content, [])
    before, most, start = pa.total_allocated_bytes(), 0, 0
    store = FeatureStore(tmp_path)
    for batch in store.batches("block0.cls"):
        assert len(batch) <= 1024 and torch.equal(
            batch, torch.from_numpy(values[start : start + len(batch)])
        )
        start, most = start + len(batch), max(most, pa.total_allocated_bytes() - before)
    assert start == shards * rows
    # a row group, decoded and not, is 2 MB; pyarrow takes 5 MB once
    assert most < 10e6
    assert torch.equal(store.features("block0.cls"), torch.from_numpy(values))


# --- wrong use ------------------------------------------------------------------------------------


def test_a_store_of_something_else_is_refused(photos: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out", open_images(str(photos))
    embed(photos, out)
    before = contents(out)
    refused: list[tuple[str, Any, Any, Any, dict[str, Any]]] = [
        ("encoder was unnamed", make_encoder(seed=1), images, make_processor(), {}),
        ("encoder was unnamed", make_encoder(layer_norm_eps=1e-3), images, make_processor(), {}),
        (
            "dtype was float32, is bfloat16; name",
            make_encoder().to(torch.bfloat16),
            images,
            make_processor(),
            {},
        ),
        ("data was .*photos", make_encoder(), images.subset(range(22)), make_processor(), {}),
        ("preprocessing was", make_encoder(), images, make_processor(18), {}),
        (
            "columns were block3.cls, now with block2.cls",
            make_encoder(),
            images,
            make_processor(),
            {"columns": ["block2.cls"]},
        ),
        ("shard_size was 5, is 6", make_encoder(), images, make_processor(), {"shard_size": 6}),
    ]
    for message, encoder, data, processor, settings in refused:
        with pytest.raises(ValueError, match=f"holds other features: {message}"):
            embed_images(encoder, data, processor, out, **settings)
    assert contents(out) == before
    embed_images(
        make_encoder(pooling="mean"), images, make_processor(), out, columns=["block3.cls"]
    )  # the same features
    with pytest.raises(ValueError, match=r"no column 'block2.cls'; it has block3.cls"):
        FeatureStore(out).features("block2.cls")
    with pytest.raises(FileNotFoundError, match="holds no features; make them"):
        FeatureStore(tmp_path / "nowhere")


def test_command_writes_a_store(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [
        "embed",
        model,
        "--dataset",
        str(photos),
        "--out",
        str(out),
        "--blocks",
        "1",
        "output",
        "--pooling",
        "cls",
        "mean",
    ]
    words += ["--last4", "--dtype", "bf16", "--num_workers", "0", "--shard_size", "8"]
    assert main(words) == 0
    assert f"The features: {COUNT} images, block1.cls (32)" in capsys.readouterr().out
    store = FeatureStore(out)
    assert list(store.columns) == [
        f"{place}.{way}" for place in ("block1", "output", "last4") for way in ("cls", "mean")
    ]
    # a folder that is there decides, whatever this machine computes
    auto = [word.replace("bf16", "auto") for word in words]
    assert main(auto) == 0
    assert "--dtype auto: bf16, as the features that are there" in capsys.readouterr().out
    assert store.manifest["encoder"]["name"] == model and store.manifest["command"] == " ".join(
        ["mim-refiner", *words]
    )
    assert torch.__version__.startswith(store.manifest["versions"]["torch"])
    encoder = make_encoder().to(torch.bfloat16)
    expected = extract_features(
        encoder, open_images(str(photos)), make_processor(), blocks=[1], loading=Loading(8)
    )
    torch.testing.assert_close(
        store.features("block1.cls"), expected.blocks[1], atol=0.02, rtol=0.02
    )


WRONG = {
    "no model": (["nowhere/model", "--dataset", "{photos}"], "nowhere/model"),
    "no data": (["{model}", "--dataset", "./nowhere"], "No file or folder './nowhere'"),
    "empty data": (["{model}", "--dataset", "{empty}"], "No images in"),
    "empty stream": (["{model}", "--dataset", "{empty}", "--streaming"], "empty"),
    "block": (
        ["{model}", "--dataset", "{photos}", "--blocks", "1", "4"],
        "blocks has 4, but the encoder's blocks are numbered 0",
    ),
    "negative block": (
        ["{model}", "--dataset", "{photos}", "--blocks", "-1"],
        "blocks has -1, but",
    ),
    "pooling": (
        ["{model}", "--dataset", "{photos}", "--pooling", "register"],
        "pooling 'register': the encoder has no register",
    ),
    "predictor": (
        ["{model}", "--dataset", "{photos}", "--pooling", "global_repr"],
        "the encoder has no predictor",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_sentence(
    case: str, model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words, message = WRONG[case]
    places = {"model": model, "photos": photos, "empty": tmp_path / "empty"}
    assert (
        main(["embed", *(word.format(**places) for word in words), "--out", str(tmp_path / "out")])
        == 2
    )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "out").exists()


def test_a_shard_of_no_images_is_refused(photos: Path, tmp_path: Path) -> None:
    encoder, images = make_encoder(), open_images(str(photos))
    with pytest.raises(ValueError, match="shard_size is 0; it must be at least 1"):
        embed_images(encoder, images, make_processor(), tmp_path / "out", shard_size=0)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_are_left_alone(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    for folder, content in (
        ("notes", "notes.txt"),
        ("checkpoint", "manifest.json"),
        ("garbled", "manifest.json"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / content).write_text(
            '{"step": 1}' if folder == "checkpoint" else "kept"
        )
    for folder in ("file", "notes", "checkpoint", "garbled", "file/below"):
        assert (
            main(["embed", model, "--dataset", str(photos), "--out", str(tmp_path / folder)]) == 2
        )
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "left alone; name another one" in said or "is a file; name a folder" in said
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"file", "notes/notes.txt", "checkpoint/manifest.json", "garbled/manifest.json"}


def test_no_cls_no_last4(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"pooling 'cls': the encoder has no CLS token \(use_cls_token=False\); use 'mean'",
    ):
        embed(photos, tmp_path / "out", make_encoder(use_cls_token=False), columns=["block3.cls"])
    with pytest.raises(ValueError, match="last4 takes the last 4 blocks, but the encoder has 3"):
        embed(photos, tmp_path / "out", make_encoder(num_hidden_layers=3), columns=["last4.cls"])
    with pytest.raises(
        ValueError, match=r"'last.cls' names no feature: give block<number>, last4 or output, a dot"
    ):
        embed(photos, tmp_path / "out", columns=["last.cls"])
    assert not (tmp_path / "out").exists()
