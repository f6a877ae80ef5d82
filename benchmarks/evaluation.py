"""Rows about evaluation on one CPU thread.

    python -m benchmarks knn knn-floor features features-bf16 features-int8 features-floor
    python -m benchmarks embed embed-int8 linear-probe

The floors are bare matrix products of the shapes that cannot be done without; the rows named after
them promise how close ours come. Before anything is timed, the answers of both ways are compared:
classes, features, weights of classifiers. `embed` reads the photographs that `views.py` does.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from transformers import ViTModel, pipeline

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.evaluation import embed_images
from mim_refiner_hf.evaluation.classifier_grid import ClassifierGrid, cross_entropy_gradient
from mim_refiner_hf.evaluation.features import encode
from mim_refiner_hf.evaluation.int8 import in_int8
from mim_refiner_hf.evaluation.knn import knn_predict
from mim_refiner_hf.evaluation.linear_probe import PROBE_LEARNING_RATES
from mim_refiner_hf.publishing import export_native, export_timm
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.runtime.device import emulates_bf16, has_int8

from .rows import LeftOut, Row, interleaved, products
from .step import assert_close
from .views import PHOTOS

BANK = 50_000
QUERIES = 2_048
WIDTH = 768
CLASSES = 100
NEIGHBOURS = 10
IMAGES = 4
DEPTH = 12
PHOTOGRAPHS = 16
CLS = "output.cls"
EMBED_PEERS = ("timm", "transformers", "sentence-transformers")
PROBE_BATCH = 1024
PROBE_STEPS = 2


def knn_ways(queries: int) -> list[Callable[[], Tensor]]:
    """The ways of k-NN that are compared.

    The whole of `knn_predict`, scikit-learn's brute force on rows that are normalised beforehand,
    and the product alone.
    """
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH)
    classes = torch.randint(CLASSES, (BANK,))
    truth = torch.randint(CLASSES, (queries,))
    bank = centres[classes] + 6 * torch.randn(BANK, WIDTH)
    rows = centres[truth] + 6 * torch.randn(queries, WIDTH)
    unit_bank = F.normalize(bank, dim=1)
    unit_rows = F.normalize(rows, dim=1)
    product = torch.empty(QUERIES, BANK)
    peer = KNeighborsClassifier(NEIGHBOURS, algorithm="brute")
    peer.fit(unit_bank.numpy(), classes.numpy())

    def ours(temperature: float = 0.07) -> Tensor:
        found = knn_predict(bank, classes, rows, k=(NEIGHBOURS,), temperature=(temperature,))
        (predicted,) = found.values()
        return predicted

    def theirs(count: int = queries) -> Tensor:
        return torch.from_numpy(peer.predict(unit_rows[:count].numpy()))

    # its votes are all alike; rows may tie but for rounding
    agreement = (ours(float("inf"))[:256] == theirs(256)).float().mean()
    assert agreement > 0.99, f"only {agreement:.2%} of the classes agree"

    def floor() -> Tensor:
        for part in unit_rows.split(QUERIES):
            torch.mm(part, unit_bank.T, out=product)
        return product

    return [ours, theirs, floor]


def knn_sizes(queries: int) -> str:
    """In words, for the note of a row."""
    return f"{queries} x {BANK} x {WIDTH}, k {NEIGHBOURS}"


def knn() -> Row:
    """k-NN against scikit-learn's."""
    measured, peer, floor = interleaved(*knn_ways(QUERIES), rounds=3)
    return Row(
        "knn",
        2.0,
        measured,
        peer,
        floor,
        f"{knn_sizes(QUERIES)}; scikit-learn's brute force, votes alike",
    )


def knn_floor() -> Row:
    """k-NN against the product alone, of which it is to reach 90 %."""
    ours, _, product = knn_ways(4 * QUERIES)
    measured, floor = interleaved(ours, product, rounds=5)
    return Row(
        "knn-floor",
        1 / 0.9,
        measured,
        floor,
        floor,
        f"{knn_sizes(4 * QUERIES)}; the product alone",
        at_most=True,
    )


def vit_products() -> Callable[[], None]:
    """The matrix products of the encoder of `features`, into tensors that are there already."""
    tokens = IMAGES * 197
    rows = torch.randn(tokens, WIDTH)
    wide = torch.randn(tokens, 4 * WIDTH)
    out = torch.empty_like(rows)
    wide_out = torch.empty_like(wide)
    square = torch.randn(WIDTH, WIDTH)
    up = torch.randn(WIDTH, 4 * WIDTH)
    down = torch.randn(4 * WIDTH, WIDTH)
    query = torch.randn(IMAGES * 12, 197, 64)
    scores = torch.empty(IMAGES * 12, 197, 197)
    attended = torch.empty_like(query)

    def products() -> None:
        # the patches, and keys and values of the last block
        for _ in range(3):
            torch.mm(rows, square, out=out)
        for _ in range(DEPTH - 1):
            # queries, keys, values and the output
            for _ in range(4):
                torch.mm(rows, square, out=out)
            torch.bmm(query, query.transpose(1, 2), out=scores)
            torch.bmm(scores, query, out=attended)
            torch.mm(rows, up, out=wide_out)
            torch.mm(wide, down, out=out)

    return products


def feature_encoder() -> tuple[MimRefinerModel, Tensor]:
    """A ViT-B/16, always with the same weights, and images for it."""
    torch.manual_seed(0)
    config = MimRefinerConfig(
        image_size=224,
        patch_size=16,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,
    )
    return MimRefinerModel(config).eval(), torch.randn(IMAGES, 3, 224, 224)


def feature_ways() -> list[Callable[[], Tensor]]:
    """CLS of a ViT-B/16 by ours, timm's and transformers' model with the same weights."""
    encoder, pixels = feature_encoder()
    config = encoder.config
    of_timm = timm.create_model(
        export_timm.timm_architecture(config), **export_timm.timm_model_args(config)
    ).eval()
    of_timm.load_state_dict(export_timm.timm_state_dict(encoder))
    with tempfile.TemporaryDirectory() as folder:
        export_native.write(Path(folder), encoder, MimRefinerImageProcessor())
        of_transformers = ViTModel.from_pretrained(folder).eval()

    ways: list[Callable[[], Tensor]] = [
        lambda: encode(encoder, pixels, ["output.cls"])["output.cls"],
        lambda: of_timm.forward_features(pixels)[:, 0],
        lambda: of_transformers(pixels).last_hidden_state[:, 0],
    ]
    for peer in ways[1:]:
        assert_close(ways[0](), peer(), 1e-5)
    return ways


FEATURE_SIZES = f"ViT-B/16, {IMAGES} images of 224 px, fp32"


@torch.inference_mode()
def features() -> Row:
    """Features against the faster of timm and transformers."""
    measured, *others, floor = interleaved(*feature_ways(), vit_products(), rounds=3)
    return Row(
        "features",
        1.0,
        measured,
        min(others),
        floor,
        f"{FEATURE_SIZES}; the faster of timm and transformers",
    )


@torch.inference_mode()
def features_floor() -> Row:
    """Features against our products alone, of whose rate they are to reach 80 %."""
    measured, floor = interleaved(feature_ways()[0], vit_products(), rounds=3)
    return Row(
        "features-floor",
        1 / 0.8,
        measured,
        floor,
        floor,
        f"{FEATURE_SIZES}; our products alone",
        at_most=True,
    )


@torch.inference_mode()
def features_bf16() -> Row:
    """Features in bfloat16 against ours in fp32, whose cosine is to stay above 0.999."""
    if emulates_bf16("cpu"):
        raise LeftOut("this CPU emulates bfloat16 (neither AMX nor AVX-512 BF16)")
    exact, *others = feature_ways()
    in_fp32 = exact()
    encoder, pixels = feature_encoder()
    encoder.to(torch.bfloat16)

    def in_bf16() -> Tensor:
        return encode(encoder, pixels, ["output.cls"])["output.cls"]

    cosine = float(F.cosine_similarity(in_bf16(), in_fp32).min())
    assert cosine >= 0.999, f"the cosine of bf16 features with fp32 ones is {cosine:.5f}"
    measured, *peers = interleaved(in_bf16, *others, rounds=3)
    note = f"ViT-B/16, {IMAGES} images of 224 px, bf16; the faster of timm and transformers in fp32"
    return Row("features-bf16", 2.0, measured, min(peers), None, f"{note}; cosine {cosine:.5f}")


@torch.inference_mode()
def features_int8() -> Row:
    """Features in int8 against ours in fp32, whose cosine is to stay above 0.999.

    Beside them ours in bfloat16, where this CPU computes it.
    """
    if has_int8("cpu") is False:
        raise LeftOut("this CPU has neither VNNI nor AMX")
    exact, *others = feature_ways()
    in_fp32 = exact()
    encoder, pixels = feature_encoder()
    quick = in_int8(encoder)
    encoder.to(torch.bfloat16)

    def in_8_bits() -> Tensor:
        return encode(quick, pixels, ["output.cls"])["output.cls"]

    def in_bf16() -> Tensor:
        return encode(encoder, pixels, ["output.cls"])["output.cls"]

    cosine = float(F.cosine_similarity(in_8_bits(), in_fp32).min())
    assert cosine >= 0.999, f"the cosine of int8 features with fp32 ones is {cosine:.5f}"
    ways = [in_8_bits, *others]
    if not emulates_bf16("cpu"):
        ways.append(in_bf16)
    measured, *peers = interleaved(*ways, rounds=3)

    note = f"ViT-B/16, {IMAGES} images of 224 px, int8; the faster of timm and transformers in fp32"
    note = f"{note}; cosine {cosine:.5f}"
    for half in peers[len(others) :]:
        note = f"{note}; ours in bf16 {half:.4f}s"
    return Row("features-int8", 2.0, measured, min(peers[: len(others)]), None, note)


def photographs(folder: Path) -> Path:
    """A new folder in there with some JPEGs; LeftOut where there are none to take."""
    if not PHOTOS.is_file():
        raise LeftOut(f"there is no {PHOTOS}; MIM_REFINER_SHARED names the folder that holds data/")
    found = open_images(str(PHOTOS)).found.sources
    inside = folder / "photographs"
    inside.mkdir()
    for place in range(PHOTOGRAPHS):
        jpeg = found[place * len(found) // PHOTOGRAPHS]
        (inside / f"{place:02d}.jpg").write_bytes(jpeg)
    return inside


def embed_ways(folder: Path) -> list[Callable[[], Tensor]]:
    """From JPEGs to features (N, D): ours into a feature store, timm, transformers and
    sentence-transformers, all with the same weights.
    """
    from sentence_transformers import SentenceTransformer

    images = open_images(photographs(folder))
    names = sorted(str(path) for path in folder.glob("*/*.jpg"))
    encoder, _ = feature_encoder()
    processor = MimRefinerImageProcessor()
    loading = Loading(PHOTOGRAPHS, 0, torch.device("cpu"))

    def into_store(model: MimRefinerModel) -> Tensor:
        with tempfile.TemporaryDirectory(dir=folder) as new:
            store = embed_images(model, images, processor, new, columns=[CLS], loading=loading)
            return store.features(CLS)

    of_timm = timm.create_model(
        export_timm.timm_architecture(encoder.config), **export_timm.timm_model_args(encoder.config)
    ).eval()
    of_timm.load_state_dict(export_timm.timm_state_dict(encoder))
    transform = timm.data.create_transform(
        (3, 224, 224),
        interpolation="bicubic",
        crop_pct=1.0,
        mean=processor.image_mean,
        std=processor.image_std,
    )

    def by_timm() -> Tensor:
        pixels = [transform(Image.open(name).convert("RGB")) for name in names]
        with torch.inference_mode():
            return of_timm.forward_features(torch.stack(pixels))[:, 0]

    (folder / "native").mkdir()
    export_native.write(folder / "native", encoder, processor)
    piped = pipeline("image-feature-extraction", str(folder / "native"), batch_size=PHOTOGRAPHS)

    def by_transformers() -> Tensor:
        return torch.cat([found[:, 0] for found in piped(names, return_tensors=True)])

    save_model_folder(folder / "ours", encoder, processor)
    sentences = SentenceTransformer(str(folder / "ours"), device="cpu")

    def by_sentences() -> Tensor:
        return sentences.encode(names, batch_size=PHOTOGRAPHS, convert_to_tensor=True)

    quick = in_int8(encoder) if has_int8("cpu") is not False else encoder
    return [
        lambda: into_store(encoder),
        lambda: into_store(quick),
        by_timm,
        by_transformers,
        by_sentences,
    ]


def embed(dtype: str, target: float) -> Row:
    """`embed` from JPEGs on, against the fastest of the three libraries in fp32."""
    if dtype == "int8" and has_int8("cpu") is False:
        raise LeftOut("this CPU has neither VNNI nor AMX")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exact, quick, *peers = embed_ways(folder)
        expected = exact()
        for peer in peers:
            cosine = float(F.cosine_similarity(peer(), expected).min())
            assert cosine > 0.999, f"another library's features have a cosine of {cosine:.5f}"
        ours = quick if dtype == "int8" else exact
        cosine = float(F.cosine_similarity(ours(), expected).min())
        assert cosine >= 0.999, f"the cosine of {dtype} features with fp32 ones is {cosine:.5f}"
        products = vit_products()

        def floor() -> None:
            for _ in range(0, PHOTOGRAPHS, IMAGES):
                products()

        measured, *others, least = interleaved(ours, *peers, floor, rounds=3)
    told = ", ".join(
        f"{name} {len(expected) / taken:.2f}"
        for name, taken in zip(EMBED_PEERS, others, strict=True)
    )
    note = (
        f"ViT-B/16, {len(expected)} JPEGs into a feature store, {dtype}, "
        f"{len(expected) / measured:.2f} images/s; in fp32 {told}"
    )
    name = "embed" if dtype == "fp32" else f"embed-{dtype}"
    return Row(name, target, measured, min(others), least, note)


def linear_probe() -> Row:
    """Steps of all classifiers of the grid.

    Against one `torch.nn.Linear` under `torch.optim.SGD` after another.
    """
    generator = torch.Generator().manual_seed(0)
    widths = (WIDTH, 2 * WIDTH, 4 * WIDTH, 5 * WIDTH)  # the paper's four kinds of features
    inputs = [torch.randn(PROBE_BATCH, width, generator=generator) for width in widths]
    labels = torch.randint(CLASSES, (PROBE_BATCH,), generator=generator)
    grids = [ClassifierGrid(width, CLASSES, PROBE_LEARNING_RATES, generator) for width in widths]
    layers = [[nn.Linear(width, CLASSES) for _ in PROBE_LEARNING_RATES] for width in widths]
    with torch.no_grad():
        for grid, row in zip(grids, layers, strict=True):
            for place, layer in enumerate(row):
                layer.weight.copy_(grid.weight[:, place].T)
                layer.bias.zero_()
    optimizers = []
    for row in layers:
        for layer, rate in zip(row, PROBE_LEARNING_RATES, strict=True):
            optimizers.append(torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9))

    def ours() -> None:
        for _ in range(PROBE_STEPS):
            for grid, rows in zip(grids, inputs, strict=True):
                grid.step(rows, cross_entropy_gradient(grid.logits(rows), labels), decay=1.0)

    def theirs() -> None:
        for _ in range(PROBE_STEPS):
            each = iter(optimizers)
            for row, rows in zip(layers, inputs, strict=True):
                for layer in row:
                    optimizer = next(each)
                    optimizer.zero_grad()
                    F.cross_entropy(layer(rows), labels).backward()
                    optimizer.step()

    ours()
    theirs()
    for grid, row in zip(grids, layers, strict=True):
        for place, layer in enumerate(row):
            assert_close(grid.weight[:, place].T, layer.weight.detach(), 1e-5)
    columns = len(PROBE_LEARNING_RATES) * CLASSES
    shapes = [(PROBE_BATCH, width, columns) for width in widths]
    shapes += [(width, PROBE_BATCH, columns) for width in widths]
    floor_of = products(*shapes * PROBE_STEPS)
    measured, peer, floor = interleaved(ours, theirs, floor_of, rounds=3)
    count = len(widths) * len(PROBE_LEARNING_RATES)
    note = (
        f"{count} classifiers, {CLASSES} classes, {PROBE_STEPS} batches of {PROBE_BATCH}; one"
        " nn.Linear after another; floor: the products"
    )
    return Row("linear-probe", 1.3, measured, peer, floor, note)


ROWS: dict[str, Callable[[], Row]] = {
    "knn": knn,
    "knn-floor": knn_floor,
    "features": features,
    "features-bf16": features_bf16,
    "features-int8": features_int8,
    "features-floor": features_floor,
    "embed": lambda: embed("fp32", 1.2),
    "embed-int8": lambda: embed("int8", 2.0),
    "linear-probe": linear_probe,
}
"""The rows of this file by name."""
