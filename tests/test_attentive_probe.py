"""The attentive probe against torch's attention under torch's AdamW, and digits."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_encoder import fresh_encoder
from torch import Tensor, nn

from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation.attentive_probe import (
    AttentiveClassifier,
    AttentiveProbes,
    attentive_probe,
    attentive_schedule,
    length_of,
)


class Plain(nn.Module):
    """The same classifier of torch's parts: query and output go through identities."""

    def __init__(self, start: AttentiveClassifier) -> None:
        super().__init__()
        dim = len(start.query)
        self.query = nn.Parameter(start.query.detach().clone())
        self.attention = nn.MultiheadAttention(dim, start.heads, batch_first=True)
        self.linear = nn.Linear(dim, start.linear.out_features)
        self.linear.load_state_dict(start.linear.state_dict())
        self.key = nn.Parameter(start.key.weight.detach().clone())
        self.value = nn.Parameter(start.value.weight.detach().clone())
        self.key_bias = nn.Parameter(start.key.bias.detach().clone())
        self.value_bias = nn.Parameter(start.value.bias.detach().clone())

    def forward(self, patches: Tensor) -> Tensor:
        one = torch.eye(len(self.query))
        zero = torch.zeros(len(self.query))
        query = self.query.expand(len(patches), 1, -1)
        pooled, _ = F.multi_head_attention_forward(
            query.transpose(0, 1),
            patches.transpose(0, 1),
            patches.transpose(0, 1),
            len(self.query),
            self.attention.num_heads,
            torch.cat([one, self.key, self.value]),
            torch.cat([zero, self.key_bias, self.value_bias]),
            None,
            None,
            False,
            0.0,
            one,
            zero,
        )
        logits: Tensor = self.linear(pooled[0])
        return logits


def test_classifier_equals_torchs_attention() -> None:
    torch.manual_seed(0)
    classifier = AttentiveClassifier(128, 5)
    assert classifier.heads == 2
    for parameter in classifier.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain = Plain(classifier)
    patches = torch.randn(3, 7, 128)
    labels = torch.tensor([0, 4, 2])
    torch.testing.assert_close(classifier(patches), plain(patches), atol=2e-4, rtol=1e-4)

    F.cross_entropy(classifier(patches), labels).backward()
    F.cross_entropy(plain(patches), labels).backward()
    pairs = [
        (classifier.query, plain.query),
        (classifier.key.weight, plain.key),
        (classifier.value.weight, plain.value),
        (classifier.value.bias, plain.value_bias),
        (classifier.linear.weight, plain.linear.weight),
    ]
    for ours, theirs in pairs:
        assert ours.grad is not None and theirs.grad is not None and theirs.grad.norm() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-4, rtol=1e-3)
    # why there is no use of it
    assert plain.key_bias.grad is not None and plain.key_bias.grad.abs().max() < 1e-5


def test_a_grid_is_trained_as_each_alone() -> None:
    settings = [(1e-2, 0.5), (3e-3, 0.0)]
    probes = AttentiveProbes(64, 3, settings, steps=6, seed=0, device=torch.device("cpu"))
    weights = [list(each.parameters()) for each in probes.classifiers]
    assert not torch.equal(weights[0][0], weights[1][0])
    plains = [Plain(classifier) for classifier in probes.classifiers]
    for plain, (rate, decay) in zip(plains, settings, strict=True):
        named = dict(plain.named_parameters())
        biases = {name for name in named if "bias" in name}
        own = [
            {"params": [named[n] for n in named if n not in biases], "weight_decay": decay},
            {"params": [named[n] for n in biases], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(own, lr=rate, betas=(0.9, 0.95))
        torch.manual_seed(1)
        for step in range(6):
            patches, labels = torch.randn(8, 5, 64), torch.randint(3, (8,))
            for group in optimizer.param_groups:
                group["lr"] = rate * attentive_schedule(step, 6)
            optimizer.zero_grad()
            F.cross_entropy(plain(patches), labels).backward()
            optimizer.step()
    torch.manual_seed(1)
    with torch.inference_mode():
        for step in range(6):
            probes.train_step(step, torch.randn(8, 5, 64), torch.randint(3, (8,)))
    for classifier, plain in zip(probes.classifiers, plains, strict=True):
        torch.testing.assert_close(classifier.query, plain.query, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(classifier.value.weight, plain.value, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(classifier.linear.bias, plain.linear.bias, atol=1e-4, rtol=1e-3)


def test_schedule_and_length_are_the_authors_on_imagenet() -> None:
    assert length_of(1_281_167) == (1024, 12_510)
    assert length_of(200) == (32, 500) and length_of(9) == (9, 500)
    rates = [attentive_schedule(step, 12_500) for step in range(12_500)]
    assert rates.index(1.0) == 1249 and rates[1250] == 1.0 and rates[-1] < 1e-6
    assert rates[624] == pytest.approx(0.5)


def test_digits_are_told_apart_and_the_encoder_stays() -> None:
    encoder = fresh_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    train = open_images("digits", split="train").subset(range(600))
    test = open_images("digits", split="test").subset(range(200))
    settings: dict[str, Any] = {"steps": 150, "learning_rates": (1e-4, 0.5)}
    processor = image_processor(encoder.config, {})
    result = attentive_probe(encoder, processor, train, test, **settings)
    score = result.scores["attentive_probe_accuracy"]
    # of ten digits, by random weights and crops of a few pixels
    assert score.value > 0.2 and "chosen on 60 held-out training images" in score.setting
    # the small rate learns nothing in so few steps
    assert score.setting.startswith("learning rate 0.5")
    assert score.per_image is not None and score.per_image.shape == (200,)
    assert np.isclose(score.per_image.mean(), score.value)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    again = attentive_probe(encoder, processor, train, test, **settings)
    assert again.metrics == result.metrics


def test_bad_input_is_named() -> None:
    encoder = fresh_encoder()
    images = open_images("digits").subset(range(40))
    settings: dict[str, Any] = {"processor": image_processor(encoder.config, {})}
    settings |= {"encoder": encoder, "train_images": images, "eval_images": images}
    with pytest.raises(ValueError, match=r"learning_rates=\(\) must be greater than 0"):
        attentive_probe(**settings, learning_rates=())
    with pytest.raises(ValueError, match=r"weight_decays=\(-1,\) must be 0 or more"):
        attentive_probe(**settings, weight_decays=(-1,))
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        attentive_probe(**settings, steps=0)
    with pytest.raises(ValueError, match="has 9 training images, but the attentive probe holds"):
        attentive_probe(**{**settings, "train_images": images.subset(range(9))})
    with pytest.raises(ValueError, match="the encoder takes 16 x 32 pixels"):
        attentive_probe(**{**settings, "encoder": fresh_encoder(image_size=[16, 32])})
