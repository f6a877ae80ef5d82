"""A feature store outlives what happens to it.

Kills, damage, several processes, images that cannot be read.
"""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_store import (
    BATCH,
    COUNT,
    SHARD,
    contents,
    embed,
    forward_passes,
    make_encoder,
    make_processor,
    write_photos,
)

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.data.stream import open_stream
from mim_refiner_hf.evaluation import FeatureStore, embed_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data"))


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
        embed_images(
            encoder, images, make_processor(), folder, shard_size=SHARD, loading=Loading(BATCH)
        )

    write(tmp_path / "whole", make_encoder())
    out, encoder = tmp_path / "out", make_encoder()
    passes = forward_passes(encoder)
    encoder.norm.register_forward_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGKILL) if len(passes) == 6 else None
    )
    # in the second batch of the third shard
    assert in_a_fork(lambda: write(out, encoder)) == signal.SIGKILL
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
    with pytest.raises(
        ValueError, match="cannot be read" if kind == "flipped" else "4 of 5 shards"
    ):
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
    embed_images(
        make_encoder(),
        stream,
        make_processor(),
        folder / "stream",
        shard_size=SHARD,
        loading=Loading(BATCH),
    )
    dist.destroy_process_group()


def test_two_processes_write_what_one_writes(photos: Path, tmp_path: Path) -> None:
    embed(photos, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "begun by one")
    for name in ("shards/00002.parquet", "records/00002.json", "records/00003.json", "broken.json"):
        (tmp_path / "begun by one" / name).unlink()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        process, (port, photos, tmp_path), nprocs=2, start_method="fork"
    )
    for name in ("from the start", "begun by one", "stream"):
        assert contents(tmp_path / name).keys() == contents(tmp_path / "one").keys(), name
    for name in ("from the start", "begun by one"):
        assert contents(tmp_path / name) == contents(tmp_path / "one"), name
    one, stream = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "stream")
    assert (
        torch.equal(one.features("block3.cls"), stream.features("block3.cls"))
        and stream.manifest["num_images"] == COUNT
    )


def test_broken_images_are_listed_and_stop_nothing(photos: Path, tmp_path: Path) -> None:
    for path in sorted(photos.rglob("*.png")):
        copy = tmp_path / path.relative_to(photos.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    whole = embed(photos, tmp_path / "whole").features("block3.cls")
    # the second batch of a shard, a whole shard, the last image
    broken = [
        3,
        4,
        *range(10, 15),
        22,
    ]
    files = sorted((tmp_path / "photos").rglob("*.png"))
    for i in broken:
        files[i].write_bytes(files[i].read_bytes()[:100] if i != 3 else b"no picture")
    store = embed(tmp_path / "photos", tmp_path / "out")
    readable = [i for i in range(COUNT) if i not in broken]
    assert store.indices.tolist() == readable
    torch.testing.assert_close(store.features("block3.cls"), whole[readable], atol=1e-6, rtol=0)
    listed = json.loads((tmp_path / "out" / "broken.json").read_text())["images"]
    assert listed == store.broken
    assert [(image["index"], image["path"]) for image in listed] == [
        (i, str(files[i])) for i in broken
    ]
    assert all(image["reason"].startswith(f"Cannot decode {image['path']}") for image in listed)
    passes = forward_passes(encoder := make_encoder())
    embed(tmp_path / "photos", tmp_path / "out", encoder)
    assert not passes


@pytest.mark.parametrize("count", [0, COUNT - 1, COUNT + 1, 10**12])
def test_a_number_of_images_that_is_not_the_data_sets_is_refused(
    count: int, photos: Path, tmp_path: Path
) -> None:
    images = open_images(str(photos))

    def write() -> object:
        encoder, processor, loading = make_encoder(), make_processor(), Loading(BATCH)
        return embed_images(encoder, images, processor, tmp_path / "out", loading=loading)

    write()
    manifest = tmp_path / "out/manifest.json"
    right = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(right) | {"num_images": count}))
    with pytest.raises(ValueError, match=rf"num_images is {count}, but the data set has {COUNT}"):
        write()

    manifest.write_text(right)
    write()


@pytest.mark.parametrize("count", [0, 1, COUNT - SHARD, COUNT - 1, COUNT + 1, 10**12])
def test_a_stream_is_counted_again_where_its_number_is_not_the_shards(
    count: int, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write() -> list[int]:
        encoder = make_encoder()
        passes = forward_passes(encoder)
        stream, loading = open_stream(str(photos)), Loading(BATCH)
        embed_images(encoder, stream, make_processor(), tmp_path, loading=loading, shard_size=SHARD)
        return passes

    write()
    manifest = tmp_path / "manifest.json"
    right = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(right | {"num_images": count}))
    with pytest.raises(ValueError, match=f"its num_images is {count}, but|is not complete"):
        FeatureStore(tmp_path)

    assert write() == []
    assert f"states {count} images and has {COUNT}" in caplog.text
    assert json.loads(manifest.read_text()) == right
    assert len(FeatureStore(tmp_path)) == COUNT
