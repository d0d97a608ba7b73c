"""Chat templates for tokenizers that have none: two by name, others from a file."""

from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.support.errors import RecipeError
from recipes.support.reporting import warn

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
TEMPLATE_NAMES = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))

_CHATML_MARKS = ("<|im_start|>", "<|im_end|>")


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template called `name`, or that in the file `name`.

    One of ours begins with the token that `tokenizer` begins a text with, if it does; a file is taken as it is.

    Raises:
        RecipeError: there is no such file, or it is no template.
    """
    path = TEMPLATES / f"{name}.jinja" if name in TEMPLATE_NAMES else Path(name)
    if path.is_dir():
        return _template_of(name, tokenizer)
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"chat_template_path = {name}: not one of {', '.join(TEMPLATE_NAMES)}, and no file that can be read: give"
            " one of these names, or the file of a Jinja template."
        ) from error
    if not template.strip():
        raise RecipeError(f"chat_template_path = {name}: the file is empty.")
    if name in TEMPLATE_NAMES and begins_texts(tokenizer):
        template = "{{- bos_token -}}" + template
    _require_syntax(name, template, tokenizer)
    _warn_of_spelled_marks(template, tokenizer)
    return template


def _template_of(folder: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Take the template of another tokenizer, if this one has the tokens that it is made of."""
    other = AutoTokenizer.from_pretrained(folder)
    if other.chat_template is None:
        raise RecipeError(f"chat_template_path = {folder}: the tokenizer there has no chat template.")
    missing = [token for token in other.get_added_vocab() if token in other.chat_template]
    if missing := [token for token in missing if token not in tokenizer.get_vocab()]:
        raise RecipeError(
            f"chat_template_path = {folder}: its template is made of tokens that the model has no embedding for"
            f" ({', '.join(missing[:5])}): `trl sft` adds them and enlarges the model; or take plain."
        )
    return str(other.chat_template)


def adjust(tokenizer: PreTrainedTokenizerBase, *, eos_token: str | None, template: str | None) -> None:
    """Give `tokenizer` another end of text and another chat template, where asked to; it is saved with them.

    Raises:
        RecipeError: the tokenizer has no such token, or none to end and to pad with, or there is no such template.
    """
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise RecipeError(f"eos_token = {eos_token}: the tokenizer has no such token.")
        tokenizer.eos_token = eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise RecipeError(
            "the tokenizer has neither a token for padding nor one for the end of a text: name one by --eos_token"
            f" (its special tokens are {', '.join(tokenizer.all_special_tokens) or 'none'})."
        )
    if template is not None:
        tokenizer.chat_template = load_template(template, tokenizer)


def begins_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` puts its beginning-of-text token before a text."""
    empty = tokenizer("")["input_ids"]
    return bool(len(empty)) and empty[0] == tokenizer.bos_token_id


def _require_syntax(name: str, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(
            f"chat_template_path = {name}, line {error.lineno}: no Jinja template ({error.message})."
        ) from error
    except Exception:  # it may refuse this one message; a record that it refuses is named by its line
        return


def _warn_of_spelled_marks(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    used = [mark for mark in _CHATML_MARKS if mark in template]
    if missing := [mark for mark in used if mark not in tokenizer.get_vocab()]:
        warn(
            f"the tokenizer has no token {' and no '.join(missing)}: these marks of the chat template are spelled in"
            " pieces; --chat_template_path plain needs none"
        )
