"""Every family through every format: python -m benchmarks.round_trips ../shared/fixtures

Takes the families' own checkpoints at golden size (random values in every tensor, outputs computed
with the authors' code), sends each to a model folder, timm, transformers' own classes, ONNX and
back, and writes benchmarks/results/round-trips.md: the worst absolute difference per step, or why a
format cannot express the family. About five minutes on one core.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from mim_refiner_hf import MimRefinerModel, load_encoder
from mim_refiner_hf.publishing.export import export
from mim_refiner_hf.publishing.hub import save_model_folder

FAMILIES = {  # as a reader knows them -> checkpoint under the fixtures
    "MAE": "mae/checkpoint_full.pth",
    "MAWS": "maws/checkpoint.pt",
    "dBOT": "dbot/checkpoint_full.pth",
    "DINO": "dino/checkpoint.pth",
    "iBOT": "ibot/checkpoint.pth",
    "MIM-Refiner (pre-norm)": "mimrefiner-prenorm/checkpoint.th",
    "I-JEPA": "ijepa/checkpoint.pth.tar",
    "CrossMAE": "crossmae/checkpoint_full.pth",
    "ConMIM (shared relative)": "conmim/checkpoint.pth",
    "ConMIM (absolute)": "conmim-abs/checkpoint.pth",
    "ConMIM (per block)": "conmim-perblock-noscale/checkpoint.pth",
    "data2vec-vision": "transformers",
    "data2vec 2.0": "data2vec2/checkpoint.pt",
    "MIM-Refiner (post-norm)": "mimrefiner-postnorm/checkpoint.th",
    "CAPI": "capi/checkpoint.pth",
    "birder's CAPI (B/14)": "birder-b14/rope_vit_reg4_b14_capi.pt",
    "birder's CAPI (So150M/14, attention pooling)": "birder-so150m-ap-rotnet/"
    "rope_vit_reg8_so150m_p14_swiglu_rms_ap_rotnet-capi.pt",
}
VERSIONS = ("torch", "transformers", "timm", "onnx", "onnxruntime", "onnxscript")
Row = dict[str, str]


def worst(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (first - second).abs().max().item()


def shown(difference: float) -> str:
    """One digit is enough; a true zero stands out."""
    return f"{difference:.0e}" if difference else "0"


def original(fixtures: Path, checkpoint: str) -> tuple[MimRefinerModel, float]:
    """The encoder, and the worst difference of its blocks from those of the authors' code."""
    file = fixtures / checkpoint
    states = json.loads((file.parent / "config.json").read_text())
    # birder's cases state their settings as birder does
    heads = states.get("num_heads") or states["model_config"]["num_heads"]
    encoder = load_encoder(file, num_heads=heads)
    pixels = load_file(file.parent / "inputs.safetensors")["pixel_values"]
    expected = load_file(file.parent / "outputs.safetensors")["blocks"]
    output = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    hidden = output.hidden_states[1:]
    config = encoder.config
    if config.use_cls_token and config.num_register_tokens:
        # birder has CLS behind the registers
        order = [*range(1, config.num_prefix_tokens), 0]
        order += range(len(order), expected.shape[2])
        hidden = [tokens[:, order] for tokens in hidden]
    return encoder, worst(torch.stack(list(hidden)), expected)


def data2vec_vision(folder: Path) -> tuple[MimRefinerModel, float]:
    """The same for transformers' own data2vec-vision with random values.

    Its authors' code reads other names.
    """
    shape = {
        "hidden_size": 36,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 144,
    }
    config = transformers.Data2VecVisionConfig(
        **shape, image_size=32, patch_size=8, use_shared_relative_position_bias=True
    )
    theirs = transformers.Data2VecVisionModel(config).eval()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.7 * (parameter.ndim == 1))

    theirs.save_pretrained(folder)
    encoder = load_encoder(folder)
    pixels = torch.randn(2, 3, 32, 32)
    return encoder, worst(encoder(pixels).last_hidden_state, theirs(pixels).last_hidden_state)


def there_and_back(encoder: MimRefinerModel, folder: Path, to: str) -> str:
    """What a round trip does to the encoder.

    It is exported and, where the format is one that we read, loaded again.
    """
    try:
        differences = export(folder / "model", folder / to, to)
    except ValueError as error:
        return str(error).split(" cannot be exported to ")[1].split(": ", 1)[1].split("; --to")[0]

    text = shown(max(differences.values()))
    if to == "onnx":
        return text
    returned = load_encoder(folder / to)
    pixels = torch.randn(2, encoder.config.num_channels, *encoder.config.image_hw)
    back = worst(returned(pixels).last_hidden_state, encoder(pixels).last_hidden_state)
    text += f", back {shown(back)}"
    if same_weights(encoder, returned):
        text += " (bit-equal weights)"
    return text


def same_weights(first: MimRefinerModel, second: MimRefinerModel) -> bool:
    """Whether two encoders have the same tensors, bit for bit."""
    ours = first.state_dict()
    theirs = second.state_dict()
    if ours.keys() != theirs.keys():
        return False
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@torch.no_grad()
def measure(fixtures: Path, checkpoint: str, folder: Path) -> Row:
    """One family's row."""
    torch.manual_seed(0)
    if checkpoint == "transformers":
        encoder, difference = data2vec_vision(folder / "source")
    else:
        encoder, difference = original(fixtures, checkpoint)
    save_model_folder(folder / "model", encoder, encoder.image_processor)
    equal = same_weights(encoder, load_encoder(folder / "model"))
    row = {
        "original -> ours": shown(difference),
        "model folder": "bit-equal" if equal else "DIFFERS",
    }
    for to, title in (("timm", "timm"), ("vit", "native class"), ("onnx", "ONNX")):
        row[title] = there_and_back(encoder, folder, to)

    if (folder / "vit").is_dir():
        stated = json.loads((folder / "vit/config.json").read_text())
        row["native class"] = f"`{stated['architectures'][0]}` {row['native class']}"
    return row


def main(fixtures: Path) -> None:
    """Measure all families and write the table."""
    rows = {}
    for family, checkpoint in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[family] = measure(fixtures, checkpoint, Path(folder))
        print(family, rows[family], flush=True)

    titles = ["family", *rows["MAE"]]
    table = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    table += [f"| {' | '.join([family, *row.values()])} |" for family, row in rows.items()]
    versions = ", ".join(f"{package} {version(package)}" for package in VERSIONS)

    text = [
        "# Round trips between formats",
        "",
        "Worst absolute difference, fp32. `original -> ours`: all blocks against the outputs of",
        "the authors' code (data2vec-vision: final tokens against transformers). The other",
        "columns: tokens and features of the exported and reloaded model against ours, in batches",
        "of 1 and 3; `back`: tokens after `load_encoder` read the export again. A sentence says",
        "what the format lacks. Models of golden size: 4 or 5 blocks, 32 to 48 wide, random",
        "values in every tensor.",
        "",
        "```bash",
        "python -m benchmarks.round_trips ../shared/fixtures",
        "```",
        "",
        *table,
        "",
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), {versions}",
    ]
    (Path(__file__).parent / "results" / "round-trips.md").write_text(
        "\n".join(text) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "fixtures", type=Path, help="folder of the families' checkpoints and outputs"
    )
    main(parser.parse_args().fixtures)
