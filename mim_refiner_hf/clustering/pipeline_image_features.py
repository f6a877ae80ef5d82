"""`pipeline("image-feature-extraction")`: one row per image where the model is one of ours.

    pipe = pipeline("image-feature-extraction", model=load_encoder("facebook/vit-mae-base"))
    rows = pipe(["a.jpg", "b.jpg"])                 # 2 lists of hidden_size numbers: pooler_output
    pipe("a.jpg", pool=False)                       # the tokens, as transformers gives them
    pipe("a.jpg", pool=True)                        # [[...]], as transformers gives it

Importing the package puts this class in the place of transformers' own. For models of other
classes it gives what that gives. Without the package, ask for `pool=True`.
"""

from typing import Any

from transformers import ImageFeatureExtractionPipeline

from .pipeline_image_clustering import processor_of

FEATURES_TASK = "image-feature-extraction"


class ImageRowsPipeline(ImageFeatureExtractionPipeline):
    """transformers' pipeline, with the image processor of a model object, and rows for ours."""

    _load_image_processor = None  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.image_processor is None:
            self.image_processor = processor_of(self.model)
        if self.image_processor is None:
            raise ValueError(
                f"{type(self.model).__name__} brings no image processor; give image_processor=, or "
                "the name that it was loaded by"
            )

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, pool: bool | None = None, return_tensors: bool = False
    ) -> Any:
        """The features of one image, see the file's docstring."""
        if pool is not None or self.model.config.model_type != "mim_refiner":
            return super().postprocess(model_outputs, pool, return_tensors)
        return super().postprocess(model_outputs, True, return_tensors)[0]
