"""Models that are there already, as `load_encoder` reads them: transformers', timm's, our own.

    encoder = load_encoder(ViTMAEModel.from_pretrained("facebook/vit-mae-base"))
    encoder = load_encoder(timm.create_model("vit_base_patch16_224.mae", pretrained=True))

The weights go the way of a checkpoint file, through the layout of their family. The object stays as
it is: its weights are copied. How images are preprocessed is not in the object; it is looked up
under the name that the model was loaded by (`config.name_or_path`, timm's `pretrained_cfg`), and
where there is none, the family's own is taken.
"""

from torch import nn
from transformers import PreTrainedModel

from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import CheckpointError
from ..runtime.wording import kind_of
from .layout import Source
from .licence import Licence, saved_licence
from .preprocessing import saved_preprocessing
from .timm_models import model_in_our_words


def source_of_object(model: object) -> Source:
    """What `load_encoder` reads of a model object.

    Raises:
        CheckpointError: naming the class, where it is a model of nobody known here.
    """
    model = unwrapped(model)
    if isinstance(model, nn.Module):
        _refuse_without_weights(model)

    if isinstance(model, PreTrainedModel):
        return _of_transformers(model)
    if isinstance(model, nn.Module) and type(model).__module__.startswith("timm."):
        name = _name_of_timm(model)
        found = Source(name, dict(model.state_dict()), {}, {}, licence=_licence_of_timm(model))
        return model_in_our_words(found, model)
    raise CheckpointError(
        f"{kind_of(model)} is no encoder that is known here; give a name, a folder, a file, or a "
        "ViT of transformers or timm"
    )


def own_encoder(model: object) -> MimRefinerModel | None:
    """The `MimRefinerModel` that an object is, or that its head stands on; else None."""
    model = unwrapped(model)
    if isinstance(model, MimRefinerModel):
        return model
    inner = getattr(model, "encoder", None)
    is_ours = isinstance(model, PreTrainedModel) and isinstance(inner, MimRefinerModel)
    return inner if is_ours else None


def unwrapped(model: object) -> object:
    """The model that `torch.compile` or a wrapper for several devices holds."""
    while isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _refuse_without_weights(model: nn.Module) -> None:
    """CheckpointError for a model of shapes alone, or with adapters that are not merged."""
    kind = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError(
            f"{kind} is on the device meta and has no weights; load them, such as with its "
            "from_pretrained, and give it again"
        )
    if any(".lora_" in name or ".base_layer." in name for name, _ in model.named_parameters()):
        raise CheckpointError(
            f"{kind} has adapters beside its weights; give what the adapters' "
            "model.merge_and_unload() returns"
        )


def _of_transformers(model: PreTrainedModel) -> Source:
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    name = model.config.name_or_path or type(model).__name__
    preprocessing = saved_preprocessing(name)
    state = dict(model.state_dict())
    return Source(name, state, config, preprocessing, licence=saved_licence(name))


def _name_of_timm(model: nn.Module) -> str:
    stated = getattr(model, "pretrained_cfg", None) or {}
    architecture = stated.get("architecture") or type(model).__name__
    tag = stated.get("tag")
    return f"{architecture}.{tag}" if tag else str(architecture)


def _licence_of_timm(model: nn.Module) -> Licence:
    """What timm states of the pretrained weights of this name; it does so for most of them."""
    stated = getattr(model, "pretrained_cfg", None) or {}
    return Licence.from_metadata(stated, where=_name_of_timm(model))
