"""A model in a GGUF file as a folder that recipes train: `python -m recipes.comparisons.unpack_gguf FILE FOLDER`.

transformers reads such a file (with `pip install gguf`) into weights that it will not save again, since it remembers
that they were quantised. Here they are written as what they are now: a model of float32, to be loaded in any dtype.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def unpack(source: Path, folder: Path) -> None:
    """Write the weights, the configuration and the tokenizer of a causal model.

    Args:
        source: The GGUF file, of an architecture that transformers reads.
        folder: Where the model goes; made if it is not there.

    Raises:
        OSError: there is no such file.
        ValueError: it is not of a kind that transformers reads.
        ImportError: the package gguf is not installed.
    """
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantized.config
    vars(config).pop("quantization_config", None)
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """Unpack; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.comparisons.unpack_gguf", description=__doc__)
    parser.add_argument("source", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="where the model and its tokenizer go")
    parsed = parser.parse_args(argv)
    if not parsed.source.is_file():
        print(f"unpack_gguf: there is no file {parsed.source}", file=sys.stderr)
        return 2
    try:
        unpack(parsed.source, parsed.folder)
    except (OSError, ValueError, ImportError) as error:
        print(f"unpack_gguf: {parsed.source} cannot be read: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
