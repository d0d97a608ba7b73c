"""`model_init_kwargs`: what `from_pretrained` takes besides, of which some have flags of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recipes.support.arguments import LmModelArguments
from recipes.support.errors import RecipeError

# As in TRL's scripts (1.16), what is given here goes before the flag.
_FLAGS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
}
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def take_over(of_model: LmModelArguments, arguments: Any) -> None:
    """Let what has a flag be given by it: then the tokenizer, the merged model and the record have it too.

    Raises:
        RecipeError: a type that there is not, or what has flags that say more.
    """
    given = dict(arguments.model_init_kwargs or {})
    if "quantization_config" in given:
        raise RecipeError("model_init_kwargs: quantization_config is asked for by --load_in_4bit or --load_in_8bit.")
    for name in [name for name in given if name in _FLAGS]:
        value = given.pop(name)
        if _FLAGS[name] == "dtype" and value not in _DTYPES:
            raise RecipeError(f"model_init_kwargs: {name} = {value}: there are {', '.join(_DTYPES)}.")
        setattr(of_model, _FLAGS[name], value)
    arguments.model_init_kwargs = given or None


@contextmanager
def naming_them(arguments: Any) -> Iterator[dict[str, Any]]:
    """Return the rest, and name it where the model that is loaded with it does not take it.

    Raises:
        RecipeError: it does not.
    """
    options = dict(arguments.model_init_kwargs or {})
    try:
        yield options
    except Exception as error:  # whatever a configuration or a constructor raises
        if not options or isinstance(error, RecipeError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"model_init_kwargs = {options}: the model is not loaded with that: {reason} (what takes effect are"
            " arguments of its from_pretrained, and names of its config.json)"
        ) from error
