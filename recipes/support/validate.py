"""Check configurations against a recipe's own parser; `hf-tam recipes validate` runs this.

python -m recipes.support.validate sft FILE.yaml [FILE.yaml ...]
"""

import contextlib
import importlib
import io
import sys

from recipes.support.config import HINT, parse_recipe_arguments


def main(argv: list[str] | None = None) -> int:
    """Print a line for each file; returns 1 if one is wrong."""
    script, *paths = sys.argv[1:] if argv is None else argv
    recipe = importlib.import_module(f"recipes.{script}")
    mistakes = {path: _find_mistake(recipe, path) for path in paths}
    for path, mistake in mistakes.items():
        print(f"{path}: {mistake or f'valid for {script}.py'}", file=sys.stderr if mistake else sys.stdout)
    return int(any(mistakes.values()))


def _find_mistake(recipe: object, path: str) -> str:
    """Return what the parser says of the file, without the path, or nothing."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parse_recipe_arguments(recipe.make_parser(), ["--config", path], demo_config=recipe.DEMO_CONFIG)
    except SystemExit:
        return errors.getvalue().strip().removeprefix("error: ").removesuffix(HINT).strip().removeprefix(f"{path}: ")
    return ""


if __name__ == "__main__":
    sys.exit(main())
