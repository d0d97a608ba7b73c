"""`recipes.support.validate`: what is said without torch is what the whole stack says, whatever a file holds."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import yaml

from recipes.support import parsers, torchless, validate
from recipes.support.config import CONFIGS
from tests.recipes.conftest import ROOT

VALUES = ("x", -1, 0, 2.5, True, [1, 2], {"a": 1})
PAIRS = (
    {"load_best_model_at_end": True, "save_strategy": "steps"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"},
    {"optim": "tam", "optim_args": "beta1=0.5"},
    {"optim": "adatam", "optim_args": "gamma=2,step_size=sgd"},
    {"optim_args": "step_size=sgd"},
    {"optim_args": "torque_steps=-1,nonfinite=never", "learning_rate": -1.0},
    {"optim_args": "foreach=true,fused=true"},
    {"optim": "adamw_torch", "learning_rate": -1.0},
    {"eval_steps": 2, "save_steps": 3, "load_best_model_at_end": True},
    {"fp16": True, "bf16": True, "use_cpu": True},
    {"lr_scheduler_type": "sometimes"},
    {"dataloader_prefetch_factor": 2},
    {"deepspeed": "missing.json"},
    {"fsdp": "full_shard"},
)
# A process by itself: torch cannot be kept out of one that has it.
QUICK = """
import json, sys
from recipes.support import torchless, validate
torchless.hide_torch()
found = []
for word in sys.stdin.read().split():
    try:
        found.append(validate._find_mistake(*word.split("=", 1), with_torch=False))
    except torchless.NeedsTorchError:
        found.append(None)
assert sys.modules["torch"] is None
print(json.dumps(found))
"""


def quickly(words):
    done = subprocess.run(
        [sys.executable, "-c", QUICK], input="\n".join(words), cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.launch
def test_shipped_configurations_are_judged_without_torch():
    paths = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "trl")
    scripts = [validate_script(path) for path in paths]
    found = quickly([f"{script}={path}" for script, path in zip(scripts, paths, strict=True)])
    assert {str(path): mistake for path, mistake in zip(paths, found, strict=True) if mistake != ""} == {}


def validate_script(path):
    from hf_tam.cli.recipe_files import recipe_of

    return recipe_of(path.read_text()).removesuffix(".py")


@pytest.mark.launch
@pytest.mark.long
@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_what_is_said_without_torch_is_what_torch_says(script, tmp_path):
    """Every key with values of every type: the quick answer is the whole stack's to the letter, or none."""
    contents = [{name: value} for name in sorted(getattr(parsers, script)().field_names) for value in VALUES]
    if script == "dpo":  # its other keys are those of sft, and trl asks whether the device is a CPU
        others = set(parsers.sft().field_names)
        contents = [{**content, "use_cpu": True} for content in contents if not set(content) & others]
    contents += [{**pair, **changes} for pair in PAIRS for changes in ({}, {"use_cpu": True})]
    paths = [tmp_path / f"{number}.yaml" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(yaml.safe_dump(content))
    answers = quickly([f"{script}={path}" for path in paths])
    wrong = {}
    for path, content, answer in zip(paths, contents, answers, strict=True):
        if content == {"use_cpu": 0}:
            continue  # TRL trains in bfloat16, for which the whole stack wants a GPU of this machine
        if answer is not None and (whole := whole_answer(script, path)) != answer:
            wrong[json.dumps(content)] = f"quick: {answer!r}, whole: {whole!r}"
    assert wrong == {}
    unanswered = [content for content, answer in zip(contents, answers, strict=True) if answer is None]
    assert len(unanswered) < 0.2 * len(contents), unanswered


def whole_answer(script, path):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return validate._find_mistake(script, str(path), with_torch=True)
        except Exception as error:  # a traceback to who runs it
            return f"{type(error).__name__}: {error}"


@pytest.mark.launch
def test_files_that_need_torch_are_judged_with_it_and_the_others_without(tmp_path):
    """bf16 asks the device, on which it is refused or not; every line is there, and one bad file is the status."""
    contents = {
        "good": "learning_rate: 1e-3\n", "bad": "learning_rat: 1\n",
        "device": "bf16: true\nuse_cpu: true\nfsdp: full_shard\nfp16: true\n",
    }  # fmt: skip
    words = []
    for name, text in contents.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        words.append(f"sft={tmp_path / name}.yaml")
    command = [sys.executable, "-m", "recipes.support.validate", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stdout == f"{tmp_path}/good.yaml: valid for sft.py\n"
    assert f"{tmp_path}/bad.yaml: unknown key 'learning_rat'; did you mean learning_rate?\n" in done.stderr
    assert "device.yaml: At most one of fp16 and bf16" in done.stderr


@pytest.mark.launch
def test_files_of_trl_are_judged_beside_others(tmp_path):
    """By TRL's parsers, which need torch; a file of ours in the same call does without."""
    (tmp_path / "bad.yaml").write_text("# Launch:    hf-tam run -- trl rloo --config bad.yaml\nnum_generation: 4\n")
    good = [CONFIGS / "trl" / "kto.yaml", CONFIGS / "gpt2" / "lora.yaml"]
    program = "import sys; from hf_tam.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "recipes", "validate", *good, tmp_path / "bad.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == [f"{good[1]}: valid for sft.py", f"{good[0]}: valid for trl kto"]
    assert f"{tmp_path}/bad.yaml: unknown key 'num_generation'; did you mean num_generations?\n" in done.stderr


def test_a_process_that_has_torch_keeps_it():
    with pytest.raises(torchless.NeedsTorchError):
        torchless.hide_torch()
    assert sys.modules["torch"] is not None
