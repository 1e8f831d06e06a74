"""Docstrings as the site's parser wants them."""

import re

import griffe


class Examples(griffe.Extension):
    """Turns `Example:`, which Google's style allows too, into `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Renames the section before the docstring is parsed.

        Args:
          obj: Module, class, function or attribute.
        """
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", text)
