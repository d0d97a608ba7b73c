"""Records as tokens and targets: what is learnt is what the assistant writes, and whatever is not is counted."""

import json
import os
import re
import subprocess
import sys

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, pack_dataset

from recipes.support.encoding import IGNORED, encode
from recipes.support.errors import RecipeError
from recipes.support.records import Records, load_file

PLAIN = (
    "{% for turn in messages %}{{ turn['role'] + ':' + turn['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MARKED = (
    "{% for turn in messages %}{{ turn['role'] + ':' }}{% if turn['role'] == 'assistant' %}"
    "{% generation %}{{ turn['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ turn['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] + eos_token }}{% endfor %}"
    "{% for turn in messages %}{{ turn['role'] + ':' + (turn['content'] or '') }}"
    "{% for call in turn['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
STRICT = (
    "{% for turn in messages %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ turn['role'] + ':' + turn['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ASKED, ANSWER = "What does the owl eat?", "The owl eats rodents."
CHAT = [
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "And the goat?"},
    {"role": "assistant", "content": "The goat eats grass."},
]
PAIR = {"prompt": ASKED, "completion": f" {ANSWER}"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 0.3}}}
CALLS = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"}]
CALLS.append({"role": "assistant", "content": "Sun."})
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def records_of(*rows):
    return Records(Dataset.from_list(list(rows), on_mixed_types="use_json"), "rows")


def encoded(*rows, tokenizer, template=None, **options):
    if template is not None:
        tokenizer.chat_template = template
    return encode(records_of(*rows), tokenizer=tokenizer, **{"max_length": 512, **options})


def targets(row, tokenizer):
    """The runs of targets, as text."""
    runs, before = [], IGNORED
    for label in row["labels"]:
        if label != IGNORED:
            runs += [[]] if before == IGNORED else []
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


def write_lines(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return load_file(str(path))


def test_completion_is_learnt_or_all_of_it(tokenizer):
    eos = tokenizer.eos_token
    (row,) = encoded(PAIR, tokenizer=tokenizer).dataset
    assert set(row) == {"input_ids", "labels"}
    assert tokenizer.decode(row["input_ids"]) == PAIR["prompt"] + PAIR["completion"] + eos
    assert targets(row, tokenizer) == [PAIR["completion"] + eos]
    (row,) = encoded(PAIR, tokenizer=tokenizer, completion_only_loss=False).dataset
    assert row["labels"][1:] == row["input_ids"][1:]
    (row,) = encoded({"text": ASKED + eos}, tokenizer=tokenizer).dataset
    assert row["labels"][1:] == row["input_ids"][1:]
    assert tokenizer.decode(row["input_ids"]) == ASKED + eos


def test_text_begins_once(tokenizer):
    """A tokenizer that begins texts, and records that a template was applied to."""
    tokenizer.bos_token = "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.bos_token_id)]
    )
    for text in ("The owl", "<|pad|>The owl"):
        for row in ({"text": text}, {"prompt": text, "completion": " eats"}):
            ids = encoded(row, tokenizer=tokenizer).dataset[0]["input_ids"]
            assert ids.count(tokenizer.bos_token_id) == 1
            assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "by prefixes"])
def test_assistant_is_learnt_or_every_token(template, tokenizer):
    eos = tokenizer.eos_token
    (row,) = encoded({"messages": CHAT}, tokenizer=tokenizer, template=template, assistant_only_loss=True).dataset
    assert targets(row, tokenizer) == [f"{ANSWER}{eos}", f"The goat eats grass.{eos}"]
    (row,) = encoded({"messages": CHAT}, tokenizer=tokenizer).dataset
    assert row["labels"][1:] == row["input_ids"][1:]
    asked = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    (row,) = encoded(asked, tokenizer=tokenizer).dataset
    assert targets(row, tokenizer) == [f"The goat eats grass.{eos}"]
    (row,) = encoded(asked, tokenizer=tokenizer, completion_only_loss=False, assistant_only_loss=True).dataset
    assert targets(row, tokenizer) == [f"{ANSWER}{eos}", f"The goat eats grass.{eos}"]


def test_what_is_cut_or_left_without_a_target_is_counted(tokenizer, capsys):
    rows = [PAIR, {"prompt": "word " * 50, "completion": " lost"}, {"prompt": "Q", "completion": ""}]
    made = encoded(*rows, {"prompt": "Q", "completion": " word" * 60}, tokenizer=tokenizer, max_length=20)
    assert len(made.dataset) == 2
    assert max(map(len, made.dataset["input_ids"])) == 20
    counts = made.counts
    assert (counts.records, counts.used, counts.cut, counts.without_target, counts.bad) == (4, 2, 2, 2, 0)
    assert counts.tokens == sum(map(len, made.dataset["input_ids"]))
    assert counts.targets == sum(label != IGNORED for row in made.dataset["labels"] for label in row)
    error = capsys.readouterr().err
    assert "warning: 2 of 4 records of rows are longer than 20 tokens and were cut" in error
    assert "warning: 2 of 4 records of rows have no completion token left: dropped" in error


def test_context_of_the_model_limits_the_length(tokenizer):
    for options, size in (({"max_length": 1000, "context_length": 128}, 128), ({"max_length": None}, 301)):
        (row,) = encoded({"text": " owl" * 300}, tokenizer=tokenizer, **options).dataset
        assert len(row["input_ids"]) == size


def test_bad_records_are_dropped_and_the_first_is_named(tokenizer, tmp_path, capsys):
    tokenizer.chat_template = STRICT
    bad = {"messages": [{"role": "system", "content": "Be kind."}, *CHAT]}
    picture = {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, CHAT[1]]}
    records = write_lines(tmp_path / "x.jsonl", {"messages": CHAT}, bad, {"messages": CHAT}, picture)
    made = encode(records, tokenizer=tokenizer, max_length=512)
    assert (made.counts.used, made.counts.bad) == (2, 2)
    place = f"{tmp_path / 'x.jsonl'}, line 2: the chat template refuses these messages: roles must alternate"
    assert f"warning: 2 of 4 records of {records.source} cannot be used: dropped; the first is {place}" in (
        capsys.readouterr().err
    )
    with pytest.raises(RecipeError, match=re.escape(place)):
        encode(records, tokenizer=tokenizer, max_length=512, on_bad_record="raise")
    with pytest.raises(
        RecipeError, match=r"none of the 1 records can be used; the first bad one is .*x.jsonl, line 4"
    ):
        encode(records.subset([3]), tokenizer=tokenizer, max_length=512)


def test_bad_record_is_named_after_holding_out(tokenizer, tmp_path):
    rows = [PAIR] * 20 + [{"prompt": "a", "completion": None}] + [PAIR] * 9
    records = write_lines(tmp_path / "x.jsonl", *rows).subset([25, 3, 20, 1])
    with pytest.raises(RecipeError, match=r"x.jsonl, line 21: the completion must be text, not None"):
        encode(records, tokenizer=tokenizer, max_length=512, on_bad_record="raise")


def test_nothing_to_learn_is_an_error(tokenizer):
    with pytest.raises(RecipeError, match="none of the 1 records has a completion token within 512 tokens"):
        encoded({"prompt": "a", "completion": ""}, tokenizer=tokenizer)
    with pytest.raises(RecipeError, match=r"need a chat template, .* give --chat_template_path, .*chatml, plain"):
        encoded({"messages": CHAT}, tokenizer=tokenizer)


def test_option_for_chats_without_chats_is_a_warning(tokenizer, capsys):
    encoded(PAIR, tokenizer=tokenizer, assistant_only_loss=True)
    assert "assistant_only_loss is without effect" in capsys.readouterr().err


def test_prompt_that_merges_with_the_completion_is_counted(tokenizer, capsys):
    encoded({"prompt": "What does the ", "completion": "owl eat?"}, PAIR, tokenizer=tokenizer)
    assert "in 1 of 2 records of rows the end of the prompt merges with the completion" in capsys.readouterr().err


def test_result_is_kept_until_something_changes(tokenizer, tmp_path, monkeypatch):
    from recipes.support.encoding import Encoder

    records, calls = write_lines(tmp_path / "x.jsonl", *[{"messages": CHAT}] * 3), []
    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, row: calls.append(row) or original(self, row))
    tokenizer.chat_template = PLAIN
    for options, expected in (({}, 3), ({}, 3), ({"max_length": 7}, 6), ({"max_length": 7}, 6)):
        encode(records, tokenizer=tokenizer, **{"max_length": 512, **options})
        assert len(calls) == expected
    tokenizer.chat_template = MARKED
    encode(records, tokenizer=tokenizer, max_length=512)
    assert len(calls) == 9


@pytest.mark.distributed
def test_several_processes_tokenise_the_same(tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN
    rows = [{"messages": CHAT}, {"messages": []}, {"messages": CHAT[:2]}] * 20
    records = write_lines(tmp_path / "x.jsonl", *rows)
    alone = encode(records, tokenizer=tokenizer, max_length=20, assistant_only_loss=True)
    shared = encode(records, tokenizer=tokenizer, max_length=20, assistant_only_loss=True, num_proc=2)
    assert shared.counts == alone.counts
    assert list(shared.dataset) == list(alone.dataset)


def test_types_of_columns(tokenizer):
    features = encoded(PAIR, tokenizer=tokenizer).dataset.features
    assert {name: feature.feature.dtype for name, feature in features.items()} == {
        "input_ids": "int32", "labels": "int32"
    }  # fmt: skip


LIKE_TRL = {
    "text": ([{"text": ASKED}, {"text": ANSWER}], {}),
    "pairs": ([PAIR, {"prompt": "What does the ", "completion": "owl eat?"}], {}),
    "all of pairs": ([PAIR], {"completion_only_loss": False}),
    "chats": ([{"messages": CHAT}, {"messages": CHAT[:2]}], {}),
    "assistant of chats": ([{"messages": CHAT}, {"messages": CHAT[:2]}], {"assistant_only_loss": True}),
    "pairs of chats": ([{"prompt": CHAT[:3], "completion": CHAT[3:]}], {}),
    # TRL gets 0.3 from datasets as 0.30000000000000004.
    "tools": ([{"messages": json.loads(json.dumps(CALLS).replace("0.3", "3")), "tools": json.dumps([TOOL])}], {}),
}


@pytest.mark.parametrize(("rows", "options"), LIKE_TRL.values(), ids=LIKE_TRL)
def test_tokens_and_targets_are_those_of_trl(rows, options, tokenizer, tiny_model, tmp_path):
    """TRL's own preparation, and what it does with ours: batches and rows of several records."""
    tokenizer.chat_template = WITH_TOOLS if "tools" in rows[0] else MARKED
    model, ours = AutoModelForCausalLM.from_pretrained(tiny_model), encoded(*rows, tokenizer=tokenizer, **options)

    def trainer(dataset, **more):
        arguments = SFTConfig(str(tmp_path), max_length=512, report_to="none", use_cpu=True, **more)
        return SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)

    theirs = trainer(records_of(*rows).dataset, **options).train_dataset
    assert ours.dataset["input_ids"] == theirs["input_ids"]
    # Nothing predicts the first token: a label there is no target, and is none of ours.
    assert [row[1:] for row in ours.dataset["labels"]] == [row[1:] for row in theirs["labels"]]
    taken = trainer(ours.dataset, dataset_kwargs={"skip_prepare_dataset": True})
    batch = next(iter(taken.get_train_dataloader()))
    assert (batch["labels"] != IGNORED).sum() == sum(
        label != IGNORED for row in ours.dataset["labels"] for label in row
    )
    packed = pack_dataset(ours.dataset, 512)
    assert sum(packed["seq_lengths"][0]) == ours.counts.tokens


@pytest.mark.slow
@pytest.mark.launch
def test_memory_does_not_grow_with_the_records(tokenizer, tmp_path):
    """What is in memory alone, not mapped from a file: the same for ten times as many records."""
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = (
        "import sys; from transformers import AutoTokenizer; from recipes.support import encoding, records\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); data = records.load_file(sys.argv[2])\n"
        "encoding.encode(data, tokenizer=tokenizer, max_length=600, assistant_only_loss=True)\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')][0])"
    )
    used = []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}.jsonl"
        line = json.dumps({"messages": [{**turn, "content": f"{turn['content']} " * 25} for turn in CHAT]})
        path.write_text(f"{line}\n" * count)
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", program, str(tmp_path / "tokenizer"), str(path)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=500)
        used.append(int(output.stdout.split()[-1]))
    assert used[1] - used[0] < 100_000, used
