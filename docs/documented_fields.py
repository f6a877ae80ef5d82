"""An extension of griffe: the settings of a recipe carry their help as docstring.

A field such as `epochs: float = documented(20, "Epochs of the refinement.")` has its explanation in
the call, where --help reads it; here the page of the Python API does.
"""

import ast
from typing import Any

import griffe


class DocumentedFields(griffe.Extension):
    """Gives every field that is made by `documented` a docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        value = attr.value
        if not isinstance(value, griffe.ExprCall) or value.canonical_name != "documented":
            return

        texts = [str(part) for part in value.arguments[1:] if not isinstance(part, griffe.Expr)]
        if texts and not attr.has_docstring:
            attr.docstring = griffe.Docstring(str(ast.literal_eval(texts[0])), parent=attr)
            attr.value = str(value.arguments[0])
