"""A configuration as the first word of a command, and by the name that `hf-tam recipes list` prints."""

from pathlib import Path

from hf_tam.cli import recipe_files


def with_config_flag(argv: list[str]) -> list[str]:
    """Return the words of a command line, in which a first word that is no flag became the value of `--config`."""
    if argv and argv[0] and not argv[0].startswith("-"):
        return [f"--config={argv[0]}", *argv[1:]]
    return argv


def find_config(named: str) -> Path:
    """Return the file that `--config` means: a path, or the name of one of ours, such as llama3.2-1b/lora.

    Raises:
        ValueError: There is no such file, and none of ours is called so; the message has the nearest.
    """
    if Path(named).exists():
        return Path(named)
    try:
        files = recipe_files.list_files(recipe_files.find_folder())
        return recipe_files.find_file(named, [file for file in files if file.kind == "configuration"]).path
    except OSError:  # installed without the recipes
        return Path(named)
    except LookupError as error:
        raise ValueError(f"cannot read the configuration {named}: no such file, and {error.args[0]}") from error
