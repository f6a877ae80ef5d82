"""Three small files by which sentence-transformers encodes images as the model itself does.

    vectors = SentenceTransformer("out/model").encode(["a.jpg", image])    # pooler_output, (2, D)

Without them it takes the mean of all tokens, CLS included, and says nothing. They name the output
that it is to take, so that every pooling is right, those with weights too. sentence-transformers
reads images in this way from version 6.2 on.
"""

import json
from pathlib import Path
from typing import Any

from ..runtime.files import write_text

# one module: transformers' own model, whose output is the vector already
_MODULE = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.base.modules.transformer.Transformer",
}
_READS = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
SENTENCE_FILES: dict[str, Any] = {
    "modules.json": [_MODULE],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": _READS,
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "similarity_fn_name": "cosine",
    },
}
"""File -> what is in it; the same for every encoder."""


def write_sentence_files(folder: Path) -> None:
    """Write what sentence-transformers reads beside a model that has a `pooler_output`."""
    for name, contents in SENTENCE_FILES.items():
        write_text(folder / name, json.dumps(contents, indent=2) + "\n")
