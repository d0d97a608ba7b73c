"""Writes the generated parts of the pages in docs/ anew: `python -m recipes.results.pages`.

Such a part stands between `<!-- begin: NAME -->` and `<!-- end -->`; NAME says which function below writes it.
"""

from __future__ import annotations

import re
from pathlib import Path

from recipes.results import evidence, speed

DOCS = Path(__file__).parents[2] / "docs"
PARTS = {
    "overview": evidence.overview,
    "step sizes": evidence.step_sizes,
    "speed": speed.table,
    "growth": speed.growth,
    "inside the trainer": speed.inside_the_trainer,
}


def render(page: str) -> str:
    """A page with its generated parts as the rows say; the white space around a part is left as it is.

    Args:
        page: Markdown.

    Raises:
        KeyError: A part has a name that nothing writes.
    """

    def written(match: re.Match[str]) -> str:
        begin, name, before, after, end = match.groups()
        return f"{begin}{before}{PARTS[name]()}{after}{end}"

    return re.sub(r"(<!-- begin: (.+?) -->)(\s*).*?(\s*)(<!-- end -->)", written, page, flags=re.DOTALL)


def main() -> None:
    """Write every page that has such parts."""
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (rendered := render(page)) != page:
            path.write_text(rendered, encoding="utf-8")
            print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
