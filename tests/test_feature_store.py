"""The feature store: what is in it, that neither interruptions nor processes nor streaming change it, and that it notices damage."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel
from mim_refiner_hf.cli import main
from mim_refiner_hf.data import open_images, open_stream
from mim_refiner_hf.evaluation import (
    FeatureStore,
    embed_images,
    extract_features,
    feature_columns,
    feature_set,
    feature_store,
    stored_features,
)
from mim_refiner_hf.publishing.hub import save_model_folder

COUNT, SHARD, BATCH = 23, 5, 3  # 5 shards of 2 batches each


def make_encoder(seed: int = 0, **changes: Any) -> MimRefinerModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = MimRefinerModel(MimRefinerConfig(**{**shape, "image_size": 16, "patch_size": 8, **changes})).eval()
    torch.nn.init.normal_(encoder.norm.weight)  # a final norm that shows
    return encoder


def make_processor(size: int = 16) -> MimRefinerImageProcessor:
    return MimRefinerImageProcessor(size={"shortest_edge": size}, crop_size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures of two classes."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        path = folder / ("cat" if i < 12 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model_folder(folder, make_encoder(), make_processor())
    return str(folder)


def embed(photos: Path, folder: Path, encoder: MimRefinerModel | None = None, **changes: Any) -> FeatureStore:
    settings = {"shard_size": SHARD, "batch_size": BATCH, **changes}
    return embed_images(encoder or make_encoder(), open_images(str(photos)), make_processor(), folder, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a store but the manifest, which may name another command."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def forward_passes(encoder: MimRefinerModel) -> list[int]:
    """A list that grows by the batch size at each forward pass."""
    passes: list[int] = []
    encoder.embeddings.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    return passes


# --- what is in it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_columns_equal_hooked_block_outputs(photos: Path, tmp_path: Path, num_workers: int) -> None:
    encoder, images = make_encoder(), open_images(str(photos))
    columns = ["block1.cls", "block3.cls", "block3.mean", "last4.mean", "output.cls"]
    store = embed(photos, tmp_path / "out", encoder, columns=columns, num_workers=num_workers)
    blocks: list[Tensor] = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: blocks.append(output))
    with torch.no_grad():
        output = encoder(**make_processor()([images[i].image for i in range(COUNT)], return_tensors="pt")).last_hidden_state
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
    assert np.array_equal(np.stack(table["output.mean"].to_numpy()), store.features("output.mean").numpy())
    assert table["label"].to_pylist() == store.labels.tolist()
    files = sorted(map(str, (tmp_path / "out" / "shards").iterdir()))
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["block3.cls"].length == 32
    assert torch.equal(torch.tensor(loaded["block3.cls"][:]), store.features("block3.cls"))


def test_stored_features_are_extracted_once(photos: Path, tmp_path: Path) -> None:
    encoder, images = make_encoder(), open_images(str(photos))
    expected = extract_features(encoder, images, make_processor(), blocks=[2, 0], batch_size=8)
    passes = forward_passes(encoder)
    for _ in range(2):
        found = stored_features(encoder, images, make_processor(), tmp_path / "out", blocks=[2, 0], batch_size=8)
        assert passes == [8, 8, 7]
        assert torch.equal(found.features, expected.features)
        assert list(found.blocks) == [0, 2]
        assert all(torch.equal(found.blocks[block], expected.blocks[block]) for block in found.blocks)
        assert found.labels is not None and expected.labels is not None and torch.equal(found.labels, expected.labels)
    fewer = stored_features(encoder, images, make_processor(), tmp_path / "out")
    assert passes == [8, 8, 7] and torch.equal(fewer.features, expected.features)


def test_stored_features_follow_the_encoder_they_are_asked_for(photos: Path, tmp_path: Path) -> None:
    store = embed(photos, tmp_path / "out", columns=["block3.cls", "block3.mean"])
    encoder, images = make_encoder(pooling="mean"), open_images(str(photos))
    found = stored_features(encoder, images, make_processor(), tmp_path / "out")
    assert torch.equal(found.features, store.features("block3.mean"))
    assert torch.equal(feature_set(store).features, store.features("block3.cls"))


def test_stored_features_without_cls_and_labels(photos: Path, tmp_path: Path) -> None:
    encoder, images = make_encoder(use_cls_token=False), open_images(str(photos / "cat"))
    found = stored_features(encoder, images, make_processor(), tmp_path / "out")
    assert found.labels is None
    torch.testing.assert_close(found.features, extract_features(encoder, images, make_processor()).features)
    assert list(FeatureStore(tmp_path / "out").columns) == ["block3.mean"]


def test_bf16_is_computed_in_bf16_and_kept_exactly(photos: Path, tmp_path: Path) -> None:
    encoder = make_encoder().to(torch.bfloat16)
    store = embed(photos, tmp_path / "out", encoder)
    features = store.features("block3.cls")
    assert store.manifest["dtype"] == "bfloat16" and features.dtype == torch.float32
    assert torch.equal(features, features.bfloat16().float())
    exact = embed(photos, tmp_path / "fp32").features("block3.cls")
    assert 0 < (features - exact).norm() < 0.03 * exact.norm()


def test_names_of_columns() -> None:
    config = make_encoder().config
    assert feature_columns(config) == ["block3.cls"]
    assert feature_columns(config, [1, "output"], ["cls", "mean"], last4=True) == [
        f"{place}.{pooling}" for place in ("block1", "output", "last4") for pooling in ("cls", "mean")
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


# --- interruptions, damage, processes -----------------------------------------------------------------------------------------


def in_a_fork(work: Callable[[], object]) -> int:
    """Runs `work` in a child process; its wait status."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_killed_and_resumed_is_the_same(photos: Path, tmp_path: Path, streaming: bool) -> None:
    def write(folder: Path, encoder: MimRefinerModel) -> None:
        images = open_stream(str(photos)) if streaming else open_images(str(photos))
        embed_images(encoder, images, make_processor(), folder, shard_size=SHARD, batch_size=BATCH)

    write(tmp_path / "whole", make_encoder())
    out, encoder = tmp_path / "out", make_encoder()
    passes = forward_passes(encoder)
    encoder.norm.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if len(passes) == 6 else None)
    assert in_a_fork(lambda: write(out, encoder)) == signal.SIGKILL  # in the second batch of the third shard
    assert sorted(path.name for path in (out / "records").iterdir()) == ["00000.json", "00001.json"]
    with pytest.raises(ValueError, match="not complete, 2 of "):
        FeatureStore(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("*.parquet")}
    encoder = make_encoder()
    passes = forward_passes(encoder)
    write(out, encoder)
    assert sum(passes) == COUNT - 2 * SHARD
    assert contents(out) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def damage(folder: Path, kind: str) -> None:
    shard, record = folder / "shards" / "00001.parquet", folder / "records" / "00001.json"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    {
        "flipped": lambda: shard.write_bytes(content),
        "truncated": lambda: shard.write_bytes(content[:-9]),
        "missing": shard.unlink,
        "half a record": lambda: record.write_text(record.read_text()[:20]),
    }[kind]()


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "half a record"])
def test_damage_is_noticed_and_repaired(photos: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    embed(photos, out)
    before = contents(out)
    damage(out, kind)
    with pytest.raises(ValueError, match="cannot be read" if kind == "flipped" else "4 of 5 shards"):
        store = FeatureStore(out)
        [store.features("block3.cls"), store.labels, store.indices, store.paths]
    encoder = make_encoder()
    passes = forward_passes(encoder)
    embed(photos, out, encoder)
    assert sum(passes) == SHARD and contents(out) == before


def process(rank: int, port: int, photos: Path, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    assert len(embed(photos, folder / "from the start")) == COUNT
    assert len(embed(photos, folder / "begun by one")) == COUNT
    stream = open_stream(str(photos))
    embed_images(make_encoder(), stream, make_processor(), folder / "stream", shard_size=SHARD, batch_size=BATCH)
    dist.destroy_process_group()


def test_two_processes_write_what_one_writes(photos: Path, tmp_path: Path) -> None:
    embed(photos, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "begun by one")
    for name in ("shards/00002.parquet", "records/00002.json", "records/00003.json", "broken.json"):
        (tmp_path / "begun by one" / name).unlink()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(process, (port, photos, tmp_path), nprocs=2, start_method="fork")
    for name in ("from the start", "begun by one", "stream"):
        assert contents(tmp_path / name).keys() == contents(tmp_path / "one").keys(), name
    for name in ("from the start", "begun by one"):
        assert contents(tmp_path / name) == contents(tmp_path / "one"), name
    one, stream = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "stream")
    assert torch.equal(one.features("block3.cls"), stream.features("block3.cls")) and stream.manifest["num_images"] == COUNT


# --- broken images, streams, memory -------------------------------------------------------------------------------------------


def test_broken_images_are_listed_and_stop_nothing(photos: Path, tmp_path: Path) -> None:
    for path in sorted(photos.rglob("*.png")):
        copy = tmp_path / path.relative_to(photos.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    whole = embed(photos, tmp_path / "whole").features("block3.cls")
    broken = [3, 4, *range(10, 15), 22]  # the second batch of a shard, a whole shard, the last image
    files = sorted((tmp_path / "photos").rglob("*.png"))
    for i in broken:
        files[i].write_bytes(files[i].read_bytes()[:100] if i != 3 else b"no picture")
    store = embed(tmp_path / "photos", tmp_path / "out")
    readable = [i for i in range(COUNT) if i not in broken]
    assert store.indices.tolist() == readable
    torch.testing.assert_close(store.features("block3.cls"), whole[readable], atol=1e-6, rtol=0)
    listed = json.loads((tmp_path / "out" / "broken.json").read_text())["images"]
    assert listed == store.broken
    assert [(image["index"], image["path"]) for image in listed] == [(i, str(files[i])) for i in broken]
    assert all(image["reason"].startswith(f"Cannot decode {image['path']}") for image in listed)
    passes = forward_passes(encoder := make_encoder())
    embed(tmp_path / "photos", tmp_path / "out", encoder)
    assert not passes


def test_a_stream_gives_what_the_table_gives(photos: Path, tmp_path: Path) -> None:
    encoded: list[bytes] = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    encoded[7] = b"no picture"
    labels = datasets.ClassLabel(names=["cat", "dog"])
    table = datasets.Dataset.from_dict({"image": encoded, "label": [i % 2 for i in range(COUNT)]}).cast_column("label", labels)
    table.to_parquet(tmp_path / "train.parquet")
    settings: dict[str, Any] = {"shard_size": SHARD, "batch_size": BATCH, "columns": ["block3.cls", "block0.mean"]}
    stores = []
    for name, opened in (("table", open_images), ("stream", open_stream)):
        images = opened(str(tmp_path / "train.parquet"))
        stores.append(embed_images(make_encoder(), images, make_processor(), tmp_path / name, **settings))
    table_store, stream_store = stores
    assert all(torch.equal(table_store.features(column), stream_store.features(column)) for column in settings["columns"])
    for store in stores:
        assert store.indices.tolist() == [i for i in range(COUNT) if i != 7]
        assert store.labels.tolist() == [i % 2 for i in range(COUNT) if i != 7] and store.class_names == ["cat", "dog"]
        assert [image["index"] for image in store.broken] == [7] and store.manifest["num_images"] == COUNT


def test_reading_takes_bounded_memory(tmp_path: Path) -> None:
    shards, rows, width = 2, 16384, 256  # 34 MB, 17 MB a shard
    manifest = {"format": feature_store.FORMAT, "num_images": shards * rows, "shard_size": rows, "class_names": None}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "columns": {"block0.cls": width}, "command": None}))
    values = np.random.default_rng(0).standard_normal((shards * rows, width), dtype=np.float32)
    for shard in range(shards):
        part = values[shard * rows : (shard + 1) * rows]
        numbers = range(shard * rows, (shard + 1) * rows)
        content = {"index": list(numbers), "label": [-1] * rows, "path": [str(i) for i in numbers], "block0.cls": part}
        feature_store.write_shard(tmp_path, shard, content, [])
    before, most, start = pa.total_allocated_bytes(), 0, 0
    store = FeatureStore(tmp_path)
    for batch in store.batches("block0.cls"):
        assert len(batch) <= 1024 and torch.equal(batch, torch.from_numpy(values[start : start + len(batch)]))
        start, most = start + len(batch), max(most, pa.total_allocated_bytes() - before)
    assert start == shards * rows
    assert most < 10e6  # a row group, decoded and not, is 2 MB; pyarrow takes 5 MB once
    assert torch.equal(store.features("block0.cls"), torch.from_numpy(values))


# --- wrong use ----------------------------------------------------------------------------------------------------------------


def test_a_store_of_something_else_is_refused(photos: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out", open_images(str(photos))
    embed(photos, out)
    before = contents(out)
    refused: list[tuple[str, Any, Any, Any, dict[str, Any]]] = [
        ("encoder was unnamed", make_encoder(seed=1), images, make_processor(), {}),
        ("encoder was unnamed", make_encoder(layer_norm_eps=1e-3), images, make_processor(), {}),
        ("dtype was float32, is bfloat16; name", make_encoder().to(torch.bfloat16), images, make_processor(), {}),
        ("data was .*photos", make_encoder(), images.subset(range(22)), make_processor(), {}),
        ("preprocessing was", make_encoder(), images, make_processor(18), {}),
        ("columns were block3.cls, now with block2.cls", make_encoder(), images, make_processor(), {"columns": ["block2.cls"]}),
        ("shard_size was 5, is 6", make_encoder(), images, make_processor(), {"shard_size": 6}),
    ]
    for message, encoder, data, processor, settings in refused:
        with pytest.raises(ValueError, match=f"holds other features: {message}"):
            embed_images(encoder, data, processor, out, **settings)
    assert contents(out) == before
    embed_images(make_encoder(pooling="mean"), images, make_processor(), out, columns=["block3.cls"])  # the same features
    with pytest.raises(ValueError, match=r"no column 'block2.cls'; it has block3.cls"):
        FeatureStore(out).features("block2.cls")
    with pytest.raises(ValueError, match="blocks has 4, but the encoder's blocks are numbered 0 to 3"):
        feature_set(FeatureStore(out), [4])
    with pytest.raises(FileNotFoundError, match="holds no features; make them"):
        FeatureStore(tmp_path / "nowhere")


def test_command_writes_a_store(model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["embed", model, "--dataset", str(photos), "--out", str(out), "--blocks", "1", "output", "--pooling", "cls", "mean"]
    words += ["--last4", "--dtype", "bf16", "--num_workers", "0", "--shard_size", "8"]
    assert main(words) == 0
    assert f"The features: {COUNT} images, block1.cls (32)" in capsys.readouterr().out
    store = FeatureStore(out)
    assert list(store.columns) == [f"{place}.{way}" for place in ("block1", "output", "last4") for way in ("cls", "mean")]
    assert store.manifest["encoder"]["name"] == model and store.manifest["command"] == " ".join(["mim-refiner", *words])
    assert torch.__version__.startswith(store.manifest["versions"]["torch"])
    encoder = make_encoder().to(torch.bfloat16)
    expected = extract_features(encoder, open_images(str(photos)), make_processor(), blocks=[1], batch_size=8)
    torch.testing.assert_close(store.features("block1.cls"), expected.blocks[1], atol=0.02, rtol=0.02)


WRONG = {
    "no model": (["nowhere/model", "--dataset", "{photos}"], "nowhere/model"),
    "no data": (["{model}", "--dataset", "./nowhere"], "No file or folder './nowhere'"),
    "empty data": (["{model}", "--dataset", "{empty}"], "No images in"),
    "empty stream": (["{model}", "--dataset", "{empty}", "--streaming"], "empty"),
    "block": (
        ["{model}", "--dataset", "{photos}", "--blocks", "1", "4"],
        "blocks has 4, but the encoder's blocks are numbered 0",
    ),
    "negative block": (["{model}", "--dataset", "{photos}", "--blocks", "-1"], "blocks has -1, but"),
    "pooling": (
        ["{model}", "--dataset", "{photos}", "--pooling", "register"],
        "pooling 'register': the encoder has no register",
    ),
    "predictor": (["{model}", "--dataset", "{photos}", "--pooling", "global_repr"], "the encoder has no predictor"),
    "batch": (["{model}", "--dataset", "{photos}", "--batch_size", "0"], "batch_size is 0; it must be at least 1"),
    "shard": (["{model}", "--dataset", "{photos}", "--shard_size", "-1"], "shard_size is -1; it must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_sentence(
    case: str, model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words, message = WRONG[case]
    places = {"model": model, "photos": photos, "empty": tmp_path / "empty"}
    assert main(["embed", *(word.format(**places) for word in words), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_are_left_alone(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    for folder, content in (("notes", "notes.txt"), ("checkpoint", "manifest.json"), ("garbled", "manifest.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / content).write_text('{"step": 1}' if folder == "checkpoint" else "kept")
    for folder in ("file", "notes", "checkpoint", "garbled", "file/below"):
        assert main(["embed", model, "--dataset", str(photos), "--out", str(tmp_path / folder)]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "left alone; name another one" in said or "is a file; name a folder" in said
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"file", "notes/notes.txt", "checkpoint/manifest.json", "garbled/manifest.json"}


def test_no_cls_no_last4(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pooling 'cls': the encoder has no CLS token \(use_cls_token=False\); use 'mean'"):
        embed(photos, tmp_path / "out", make_encoder(use_cls_token=False), columns=["block3.cls"])
    with pytest.raises(ValueError, match="last4 takes the last 4 blocks, but the encoder has 3"):
        embed(photos, tmp_path / "out", make_encoder(num_hidden_layers=3), columns=["last4.cls"])
    with pytest.raises(ValueError, match=r"'last.cls' names no feature: give block<number>, last4 or output, a dot"):
        embed(photos, tmp_path / "out", columns=["last.cls"])
    assert not (tmp_path / "out").exists()
