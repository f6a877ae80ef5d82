"""What the commands that publish can write; nothing is imported here, as `--help` shows it."""

TOOLS = ("fiftyone", "label-studio")
"""What `also` of `cluster` may name."""

DTYPES = ("float32", "bfloat16", "float16")
"""Of the weights that `convert` writes."""

EXPORT_FORMATS = {
    "native": "export_back",
    "timm": "export_timm",
    "vit": "export_native",
    "onnx": "export_onnx",
}
"""Name after `--to` -> module, imported when asked for: timm is slow, and onnx is an extra."""
