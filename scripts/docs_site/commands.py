"""The reference of the command line, from the commands' own help."""

from __future__ import annotations

import re

from gradwire_cli.app import app


def markdown() -> str:
    """The help of every command, below headings of the second level and deeper."""
    text = app.generate_docs(heading_level=1, max_heading_level=4)
    # The page has its own title, and the site its own table of contents.
    _, _, text = text.partition("**Commands**:")
    overview, _, rest = text.partition("\n## ")
    # Commands with a usage of their own get their name twice (Cyclopts 5.4).
    rest = re.sub(r"(?m)^(gradwire(?: \w+)*?) (\w+) \2\b", r"\1 \2", rest)
    rest = rest.replace("\n        ", "\n    ")
    return f"{overview.strip()}\n\n## {rest}"
