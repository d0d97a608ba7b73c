"""Chats by templates: the assistant's turns are told from the rest, with every stock template, and tools arrive."""

import copy
import json
import re
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from recipes.support.chat import load_template
from recipes.support.encoding import IGNORED, encode
from recipes.support.errors import RecipeError
from recipes.support.rendering import Renderer
from recipes.support.turns import BadRecordError
from tests.recipes.test_encoding import (
    ANSWER,
    CALLS,
    CHAT,
    MARKED,
    PLAIN,
    TOOL,
    WITH_TOOLS,
    encoded,
    targets,
    write_lines,
)

FORGETFUL = "{{ messages|length }}" + PLAIN


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("template", [MARKED, PLAIN, "chatml", "plain"])
def test_chat_that_begins_with_the_assistant_does_not_learn_its_header(template, tokenizer):
    if template in ("chatml", "plain"):
        template = load_template(template, tokenizer)
    (row,) = encoded({"messages": CHAT[1:]}, tokenizer=tokenizer, template=template, assistant_only_loss=True).dataset
    first, second = targets(row, tokenizer)
    assert first.strip().startswith(ANSWER)
    assert second.strip().startswith("The goat eats grass.")
    assert "assistant" not in first + second


TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# Those of models that see take contents in parts, by a processor.
OF_VISION = {"idefics3", "llava_next", "smolvlm"}

ALTERNATING = {"cohere", "cohere2", "gemma", "gemma3"}

STOCK = sorted(
    path.stem
    for path in TEMPLATES.glob("*.jinja")
    if not path.stem.endswith("_training") and path.stem not in OF_VISION
)


def with_template(tokenizer, name):
    """The tokenizer with a stock template, and one token for each of its marks."""
    tokenizer = copy.deepcopy(tokenizer)
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    marks = sorted(set(re.findall(r"<[^<>\s'\"{}/=:]{2,40}>", template)))
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "bos_token": "<s>"})
    tokenizer.chat_template = template
    return tokenizer


def test_there_are_stock_templates_to_try():
    assert len(STOCK) >= 38


@pytest.mark.parametrize("name", STOCK)
def test_stock_template_learns_the_assistant_and_where_to_stop(name, tokenizer):
    tokenizer = with_template(tokenizer, name)
    # Some templates refuse a chat that begins with the assistant.
    rows = [{"messages": CHAT}, *([] if name in ALTERNATING else [{"messages": CHAT[1:]}])]
    made = encoded(*rows, tokenizer=tokenizer, assistant_only_loss=True, max_length=None)
    assert made.counts.used == len(rows)
    for row in made.dataset:
        for run, content in zip(targets(row, tokenizer), (ANSWER, "The goat eats grass."), strict=True):
            before, after = run.split(content)
            # Beside an empty thought and the marks of a channel nothing is learnt that is not the turn itself.
            assert not re.search(r"(?<!to=)user|User|assistant|Assistant|What|And", before), run
            ending = tokenizer(after.strip(), add_special_tokens=False)["input_ids"][0]
            assert ending in tokenizer.get_added_vocab().values(), run


def test_template_that_trl_marks_is_found_by_its_text(tokenizer):
    """The template rewrites what was thought before, so that prefixes would not do."""
    tokenizer = with_template(tokenizer, "qwen3")
    (row,) = encoded({"messages": CHAT}, tokenizer=tokenizer, assistant_only_loss=True).dataset
    assert len(targets(row, tokenizer)) == 2


@pytest.mark.parametrize("template", [FORGETFUL, "{# mine #}", "ours"], ids=["counts turns", "of Qwen3", "of Qwen3.5"])
def test_template_that_rewrites_earlier_turns_is_read_all_the_same(template, tokenizer):
    """TRL knows none of these: two are its own but for a comment."""
    if template != FORGETFUL:
        tokenizer = with_template(tokenizer, "qwen3" if template == "{# mine #}" else "qwen3_5_nothink")
        template = "{# mine #}" + tokenizer.chat_template
    (row,) = encoded({"messages": CHAT}, tokenizer=tokenizer, template=template, assistant_only_loss=True).dataset
    first, second = (run.removeprefix("<think>\n\n</think>\n\n") for run in targets(row, tokenizer))
    end = tokenizer.eos_token if template == FORGETFUL else "<|im_end|>\n"  # as TRL's copy has it
    assert (first, second) == (f"{ANSWER}{end}", f"The goat eats grass.{end}")


REASONS = {"reasoning_content": "Owls hunt.", "thinking": "Owls hunt."}
KINDS_OF_CHATS = {
    "system": [{"role": "system", "content": "Be kind."}, *CHAT],
    "reasoning": [*CHAT[:3], {**CHAT[3], **REASONS}],
    "tools": [*CALLS, *CHAT[2:]],
    "alike": [*CHAT[:2], *CHAT[:2]],
}
# TRL learns the end of what tools returned, or the next header, and not where the model stops for a tool.
OTHERWISE_BY_TRL = {("deepseekv3", "tools"), ("diffusion_gemma", "tools")}


@pytest.mark.parametrize("kind", KINDS_OF_CHATS)
@pytest.mark.parametrize("name", [*STOCK, *sorted(OF_VISION)])
def test_turns_of_a_template_that_trl_has_no_copy_of_are_learnt_whole(name, kind, tokenizer):
    """Each is one of TRL's with a comment in front: the runs are those of TRL's marked copy."""
    turns, tools, made = KINDS_OF_CHATS[kind], [TOOL] if kind == "tools" else None, []
    for comment in ("", "{# mine #}"):
        known = with_template(tokenizer, name)
        known.chat_template = comment + known.chat_template
        try:
            ids, mask, _ = Renderer(known, marks_assistant=True).render(turns, tools)
        except BadRecordError as error:
            made.append(str(error))
            continue
        row = {"labels": [token if wanted else IGNORED for token, wanted in zip(ids, mask, strict=True)]}
        made.append((ids, ["".join(run.split()) for run in targets(row, known)]))
    if isinstance(made[1], str):  # the template knows no system, or no tools
        assert made[0] == made[1]
        return
    (their_ids, theirs), (our_ids, ours) = made
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    assert len(theirs) == len(ours) == len(answers)
    for turn, run in zip(answers, ours, strict=True):
        assert "".join((turn["content"] or "weather").split()) in run
    if our_ids == their_ids and (name, kind) not in OTHERWISE_BY_TRL:
        assert ours == theirs
    else:  # TRL's copy keeps earlier thoughts, or ends the last turn
        assert ours[-1] == theirs[-1].removesuffix("<|user|>")


def test_template_whose_turns_cannot_be_told_is_refused(tokenizer):
    template = f"{PLAIN}{{{{ messages|map(attribute='content')|join|length }}}}"
    with pytest.raises(RecipeError, match="rows, record 1: the chat template rewrites earlier turns"):
        encoded({"messages": CHAT}, tokenizer=tokenizer, template=template, assistant_only_loss=True)
    assert encoded({"messages": CHAT}, tokenizer=tokenizer).counts.used == 1


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), json.dumps([TOOL["function"]])], ids=["list", "JSON", "flat"]
)
def test_tools_reach_the_tokens(tools, tokenizer):
    (row,) = encoded({"messages": CALLS, "tools": tools}, tokenizer=tokenizer, template=WITH_TOOLS).dataset
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith("weather")
    assert '{"name": "weather", "arguments": {"city": "Rome", "days": 0.3}}' in text
    assert "None" not in text


@pytest.mark.parametrize("row", [{"messages": CALLS}, {"messages": CHAT, "tools": [TOOL]}], ids=["calls", "tools"])
def test_template_that_leaves_tools_out_is_an_error(row, tokenizer):
    silent = PLAIN.replace("turn['content']", "(turn['content'] or '')")
    with pytest.raises(RecipeError, match=r"rows, record 2: the chat template leaves out the tool 'weather'"):
        encoded({"messages": CHAT, "tools": None}, row, tokenizer=tokenizer, template=silent)


# Templates with tools, as TRL tells by trying.
WITH_CALLS = [
    name for name in STOCK if re.match(r"qwen|gemma4|glm|gptoss|llama3_|deepseekv3|nemotron|muse|lfm2_", name)
]


@pytest.mark.parametrize("name", [name for name in WITH_CALLS if name != "qwen2_5_vl"])
@pytest.mark.parametrize("assistant_only", [True, pytest.param(False, marks=pytest.mark.long)])
def test_stock_templates_carry_calls(name, assistant_only, tokenizer):
    tokenizer = with_template(tokenizer, name)
    options = {"assistant_only_loss": assistant_only, "max_length": None}
    made = encoded({"messages": CALLS, "tools": [TOOL]}, tokenizer=tokenizer, **options)
    (row,) = made.dataset
    text = tokenizer.decode(row["input_ids"])
    assert {"weather", "Rome", "sunny"} <= set(re.findall(r"\w+", text)), text


def thinking(turn):
    return {**turn, **REASONS}


def test_reasoning_that_a_template_leaves_out_is_said(tokenizer, capsys):
    """Qwen3 drops what was thought before: where that was to be learnt, the record is one that it cannot carry."""
    tokenizer = with_template(tokenizer, "qwen3")
    early, last = [CHAT[0], thinking(CHAT[1]), *CHAT[2:]], [*CHAT[:3], thinking(CHAT[3])]
    made = encoded({"messages": early}, {"messages": last}, tokenizer=tokenizer)
    assert (made.counts.used, made.counts.bad) == (1, 1)
    assert "leaves out the reasoning of a turn that is learnt, 'Owls hunt.'" in capsys.readouterr().err
    pairs = [{"prompt": chat[:3], "completion": chat[3:]} for chat in (early, last)]
    made = encoded(*pairs, tokenizer=tokenizer)
    assert (made.counts.used, made.counts.bad, made.counts.without_reasoning) == (2, 0, 1)
    assert "in 1 of 2 records of rows the chat template leaves out the reasoning of turns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "answer"),
    [("qwen2_5", thinking(CHAT[1])), ("deepseek_r1_distill", {**CHAT[1], "content": f"<think>Hm.</think>{ANSWER}"})],
)
def test_reasoning_that_a_template_ignores_is_no_answer(name, answer, tokenizer):
    tokenizer = with_template(tokenizer, name)
    with pytest.raises(RecipeError, match=r"none of the 1 records can be used; .* the reasoning of a turn"):
        encoded({"messages": [CHAT[0], answer, *CHAT[2:]]}, tokenizer=tokenizer)


def test_thought_written_into_the_content_is_carried(tokenizer):
    tokenizer = with_template(tokenizer, "qwen3")
    answer = {**CHAT[1], "content": f"<think>Hm.</think>{ANSWER}"}
    assert encoded({"messages": [CHAT[0], answer]}, tokenizer=tokenizer).counts.used == 1


def test_role_and_call_that_a_template_drops_are_said(tokenizer):
    developer = [{"role": "developer", "content": "Be kind."}, *CHAT]
    with pytest.raises(RecipeError, match=r"leaves out what the developer says, 'Be kind\.'"):
        encoded({"messages": developer}, tokenizer=with_template(tokenizer, "glm4moe"))
    with pytest.raises(RecipeError, match="leaves out the call of 'weather'"):
        encoded({"messages": CALLS, "tools": [TOOL]}, tokenizer=with_template(tokenizer, "lfm2"), max_length=None)


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("name", sorted(OF_VISION))
def test_template_of_contents_in_parts_gets_parts(name, assistant_only, tokenizer):
    tokenizer = with_template(tokenizer, name)
    (row,) = encoded({"messages": CHAT}, tokenizer=tokenizer, assistant_only_loss=assistant_only).dataset
    text = tokenizer.decode(row["input_ids"])
    assert all(turn["content"] in text for turn in CHAT)
    if assistant_only:
        first, second = targets(row, tokenizer)
        assert first.strip().startswith(ANSWER)
        assert second.strip().startswith("The goat eats grass.")


def test_options_of_the_template_come_with_the_record(tokenizer):
    template = "{{ mood }}|" + PLAIN
    rows = [{"messages": CHAT, "chat_template_kwargs": {"mood": mood}} for mood in ("owl", "goat")]
    made = encoded(*rows, tokenizer=tokenizer, template=template).dataset
    assert [tokenizer.decode(row["input_ids"]).split("|")[0] for row in made] == ["owl", "goat"]


def test_numbers_in_calls_are_as_they_were_written(tokenizer, tmp_path):
    tokenizer.chat_template = WITH_TOOLS
    (row,) = encode(
        write_lines(tmp_path / "x.jsonl", {"messages": CALLS}), tokenizer=tokenizer, max_length=512
    ).dataset
    assert '"days": 0.3}' in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("template", [MARKED, PLAIN, FORGETFUL])
@pytest.mark.parametrize("given", [{"weight": 0}, {"train": False}], ids=["OpenAI", "axolotl"])
def test_turn_that_is_not_to_be_learnt(given, template, tokenizer):
    rows = [{"messages": [CHAT[0], {**CHAT[1], **given}, *CHAT[2:]]}]
    made = encoded(*rows, tokenizer=tokenizer, template=template, assistant_only_loss=True)
    assert targets(made.dataset[0], tokenizer) == [f"The goat eats grass.{tokenizer.eos_token}"]
    with pytest.raises(RecipeError, match=r"the weight 0 .* takes assistant_only_loss"):
        encoded(*rows, tokenizer=tokenizer)
