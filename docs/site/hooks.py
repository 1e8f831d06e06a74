"""Links of the pages to files of the repository that the site shows elsewhere."""

import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Points links to `examples/NAME` at the page that shows the examples.

    Args:
      markdown: Text of a page.
      page: Page it is of.
    """
    up = "../" * page.file.src_uri.count("/")
    return re.sub(
        r"\]\((?:\.\./)+examples/([\w.]+)\)",
        lambda match: f"]({up}guide/examples.md#{match[1].replace('.', '')})",
        markdown,
    )
