"""docs/after-training.md: what it says of a finished run is done to one, in the order of the page."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.data.animals import make_questions
from tests.recipes.conftest import ROOT

PAGE = (ROOT / "docs" / "after-training.md").read_text()
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(remark=""):
    """Language and code of each block under the headings with this remark in brackets, or without any."""
    found = []
    for section in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        if (re.search(r"\((.+)\)$", heading) or [None, ""])[1] == remark:
            found += FENCED.findall(section)
    return found


@pytest.fixture
def finished_run(sft, tmp_path, monkeypatch):
    """A folder to be in, with outputs/sft of a short run in it, and the recipes."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    flags = ["--config=demo/sft-lora", "--num_sample_generations=0", f"--output_dir={tmp_path / 'outputs/sft'}"]
    assert sft(*flags)[0] == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    return tmp_path / "outputs"


def shell(line):
    subprocess.run(["bash", "-ec", line], check=True, timeout=300)


def test_every_command_is_run_or_says_that_it_is_not():
    remarks = ("", "not run here", "run where it is installed")
    assert sum(len(blocks(remark)) for remark in remarks) == len(FENCED.findall(PAGE))
    assert [language for language, _ in blocks()] == ["bash", "python", "python", "python"]


@pytest.mark.launch
@pytest.mark.long
def test_the_page_is_done_from_top_to_bottom(finished_run, capsys):
    for language, code in blocks():
        shell(code) if language == "bash" else exec(code, {})
    capsys.readouterr()
    by_sft, by_peft = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (finished_run / "sft" / "merged", finished_run / "sft-merged")
    )
    torch.testing.assert_close(dict(by_sft), dict(by_peft))
    if importlib.util.find_spec("lm_eval"):
        (_, task), (_, command) = blocks("run where it is installed")
        Path("tasks").mkdir()
        Path("tasks/mine.yaml").write_text(task)
        Path("test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in make_questions(seed=0)[1][:4]))
        shell(command.replace("lm_eval ", f"{sys.executable} -m lm_eval --device cpu ", 1))
