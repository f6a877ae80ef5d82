"""A tiny CAPI-like encoder with random values everywhere, for the tests of its parts."""

from typing import Any

from random_weights import randomise

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "norm_type": "rmsnorm",
    "position_encoding": "rope",
    "bias": "none",
    "use_cls_token": False,
    "num_register_tokens": 4,
    "final_norm_affine": False,
    "predictor_layers": 1,
}
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def tiny(**settings: Any) -> MimRefinerModel:
    """Random values in every parameter, frequencies included.

    Norms around 0.7, so that the tokens stay of order one.
    """
    return randomise(MimRefinerModel(MimRefinerConfig(**{**TINY, **settings})))
