"""What is no result ends in one line and a status other than 0."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from recipes import classify, domains, seq2seq, shift, vision
from recipes.support import early_checks
from recipes.support.config import CONFIGS
from tests.recipes.test_target_loss import encoder, image_classifier, t5

QUIET = ["--save_strategy=no", "--report_to=none", "--disable_tqdm=true", "--use_cpu=true", "--eval_strategy=no"]
DEMOS = {classify: "classify", domains: "domains", seq2seq: "seq2seq", shift: "shift", vision: "vision"}


def only_error(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("recipe", DEMOS, ids=DEMOS.values())
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--do_train", "false"], "do_train = false: this recipe always trains"),
        (["--do_train=False"], "do_train = False: this recipe always trains"),
        (["--do-predict"], "do_predict = true: this recipe writes no predictions"),
        (["--do_eval=false"], "do_eval = false: what is measured"),
    ],
    ids=str,
)
def test_a_part_that_a_recipe_does_not_have_is_refused(recipe, flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        recipe.main([*flags, f"--output_dir={tmp_path / 'out'}"])
    assert leaving.value.code == 2
    assert message in only_error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_part_is_refused_in_a_file_too(tmp_path, capsys):
    path = tmp_path / "classify.yaml"
    path.write_text((CONFIGS / "demo" / "classify.yaml").read_text() + "do_train: false\n")
    with pytest.raises(SystemExit):
        classify.main(["--config", str(path)])
    assert "do_train = false" in only_error(capsys)


@pytest.mark.long
@pytest.mark.parametrize("recipe", DEMOS, ids=DEMOS.values())
def test_no_step_is_no_result(recipe, tmp_path, capsys):
    folder = tmp_path / "out"
    config = CONFIGS / "demo" / f"{DEMOS[recipe]}.yaml"
    status = recipe.main(["--config", str(config), *QUIET, "--num_train_epochs=0", f"--output_dir={folder}"])
    assert status == 1
    assert "no step was taken: num_train_epochs is 0" in only_error(capsys)
    assert not list(folder.glob("*.safetensors"))
    assert not (folder / "results.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("make", [encoder, image_classifier, t5], ids=["classify", "vision", "seq2seq"])
def test_what_is_no_number_is_no_result(make, tmp_path, capsys, monkeypatch):
    """A step of sgd as large as that leaves nothing that a float could hold."""
    monkeypatch.setattr(early_checks, "_LARGEST_LEARNING_RATE", 1e38)
    recipe, flags = make({encoder: "bert", image_classifier: "vit", t5: "t5"}[make], tmp_path)
    folder = tmp_path / "out"
    steps = ["--max_steps=3", "--optim=sgd", "--learning_rate=1e30", "--max_grad_norm=0"]
    assert recipe.main([*flags, *QUIET, *steps, "--warmup_steps=0", f"--output_dir={folder}"]) == 1
    assert "nothing was saved; take a lower learning_rate" in only_error(capsys)
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.long
def test_a_model_that_began_with_no_number_is_no_result(tmp_path, capsys):
    recipe, flags = encoder("bert", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] = torch.nan
    model.save_pretrained(tmp_path)
    status = recipe.main([*flags, *QUIET, "--max_steps=1", "--optim=sgd", f"--output_dir={tmp_path / 'out'}"])
    assert status == 1
    assert "nothing was saved" in only_error(capsys)
    assert not (tmp_path / "out" / "results.json").exists()
