"""A saved model in libraries that know nothing of this package: peft and MTEB."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.publishing import save_model_folder

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random model."""
    torch.manual_seed(0)
    config = MimRefinerConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    encoder = MimRefinerModel(config).eval()
    save_model_folder(tmp_path / "model", encoder, image_processor(config, {}))
    return tmp_path / "model"


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["qv", "all-linear"])
def test_peft_adapters_attach_merge_and_come_back(
    folder: Path, tmp_path: Path, targets: list[str] | str
) -> None:
    peft = pytest.importorskip("peft")
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    base = MimRefinerModel.from_pretrained(folder).eval()
    with torch.no_grad():
        before = base(pixels).pooler_output

    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets)).eval()
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    per_block = 2 if isinstance(targets, list) else 6
    assert len(trained) == 2 * per_block * base.config.num_hidden_layers
    with torch.no_grad():
        # an adapter begins as none
        assert torch.equal(adapted(pixels).pooler_output, before)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
        after = adapted(pixels).pooler_output
    assert (after - before).abs().max() > 1e-2

    adapted.save_pretrained(tmp_path / "adapter")
    anew = AutoModel.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(anew, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(pixels).pooler_output, after)
        merged = again.merge_and_unload()
        assert isinstance(merged, MimRefinerModel)
        assert torch.allclose(merged(pixels).pooler_output, after, atol=1e-5)


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mteb_groups_its_features(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three colours, told apart by any encoder: NMI 1; and labels at random: near 0."""
    pytest.importorskip("mteb")
    program = script("mteb_clustering")
    random = np.random.default_rng(0)
    for split, is_random in (("colours", False), ("random", True)):
        for place in range(60):
            colour = place % 3
            label = int(random.integers(3)) if is_random else colour
            named = tmp_path / split / f"class{label}"
            named.mkdir(parents=True, exist_ok=True)
            noise = random.integers(-20, 20, (16, 16, 3))
            pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(named / f"{place}.png")

    for split, least, most in (("colours", 0.999, 1.001), ("random", 0.0, 0.3)):
        words = ["mteb_clustering.py", str(folder), "--dataset", str(tmp_path / split)]
        monkeypatch.setattr("sys.argv", words)
        assert program.main() == 0
        line = capsys.readouterr().out.strip().splitlines()[-1]
        assert line.startswith("OwnImages: v_measure ")
        assert least <= float(line.split("nmi ")[1].split()[0]) <= most

    (tmp_path / "flat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "flat/a.png")
    monkeypatch.setattr("sys.argv", [*words[:3], str(tmp_path / "flat")])
    assert program.main() == 2
    assert "has no labels to compare groups with" in capsys.readouterr().err
