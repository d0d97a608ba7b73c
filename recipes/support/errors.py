"""The one exception of the recipes, and how it leaves the process."""

import functools
import sys
from collections.abc import Callable


class RecipeError(Exception):
    """Something the user can mend: the message says what was wrong, with the value, and what to do."""


class NothingToDo(Exception):
    """What was asked for is there already: the message says where."""


def exit_with_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a `main` so that a RecipeError, or Ctrl-C before training, ends in one line instead of a traceback."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except RecipeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except NothingToDo as reason:
            print(reason)
            return 0
        except KeyboardInterrupt:
            print("interrupted outside training: no checkpoint was written", file=sys.stderr)
            return 130

    return wrapped
