"""What classify.py and vision.py leave behind loads the usual way, with the names of the classes."""

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from recipes import classify
from recipes.data import help_desk
from recipes.support import image_data
from tests.recipes.test_target_loss import LORA, MODELS, encoder, image_classifier

NAMES = sorted(help_desk.TRAIN)
QUESTION = "When do you open on Sundays?"
PLAIN = ["--max_steps=4", "--learning_rate=1e-2", "--save_strategy=no", "--report_to=none", "--disable_tqdm=true"]
PLAIN += ["--use_cpu=true"]


def trained(recipe, flags, output_dir, *more):
    assert recipe.main([*flags, *PLAIN, f"--output_dir={output_dir}", *more]) == 0
    return output_dir


def texts(folder):
    return AutoTokenizer.from_pretrained(folder)(["when do you open", QUESTION], padding=True, return_tensors="pt")


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.long
@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_an_adapter_for_texts_loads_by_its_folder_alone(name, tmp_path):
    recipe, flags = encoder(name, tmp_path)
    folder = trained(recipe, [*flags, *LORA], tmp_path / "out")
    classes = AutoConfig.from_pretrained(folder)
    assert list(classes.id2label.values()) == NAMES
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (answer,) = pipeline("text-classification", model=str(folder))(QUESTION)
    assert answer["label"] == NAMES[logits_of(model, texts(folder))[1].argmax()]
    named = {"id2label": classes.id2label, "label2id": classes.label2id, "ignore_mismatched_sizes": True}
    by_peft = AutoPeftModelForSequenceClassification.from_pretrained(folder, **named)
    torch.testing.assert_close(logits_of(by_peft, texts(folder)), logits_of(model, texts(folder)))
    with by_peft.disable_adapter():  # it is in what was loaded, and not the base alone
        assert not torch.allclose(logits_of(by_peft, texts(folder)), logits_of(model, texts(folder)))


@pytest.mark.long
def test_an_adapter_for_images_loads_by_its_folder_alone(tmp_path):
    recipe, flags = image_classifier("vit", tmp_path)
    folder = trained(recipe, [*flags, *LORA, "--merge"], tmp_path / "out")
    picture = image_data._read(image_data.demo_records()[2].dataset[0]["image"])
    answers = [
        {answer["label"]: answer["score"] for answer in pipeline("image-classification", model=str(path))(picture)}
        for path in (folder, folder / "merged")
    ]
    assert answers[0] == pytest.approx(answers[1], abs=1e-5)
    model = AutoModelForImageClassification.from_pretrained(folder)
    inputs = AutoImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt")
    scores = logits_of(model, inputs).softmax(dim=1)[0]
    assert {str(digit): scores[digit].item() for digit in scores.topk(5).indices.tolist()} == pytest.approx(answers[0])


@pytest.mark.long
def test_a_finished_run_is_merged_alone(tmp_path, capsys):
    recipe, flags = encoder("bert", tmp_path)
    folder = trained(recipe, [*flags, *LORA], tmp_path / "out")
    before = (folder / "adapter_model.safetensors").read_bytes()
    assert recipe.main(["--merge", f"--output_dir={folder}"]) == 0
    assert "merged: " in capsys.readouterr().out
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert not (folder / "merged" / "adapter_config.json").exists()
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert list(merged.config.id2label.values()) == NAMES
    expected = logits_of(AutoModelForSequenceClassification.from_pretrained(folder), texts(folder))
    torch.testing.assert_close(logits_of(merged, texts(folder)), expected, rtol=1e-4, atol=1e-5)


def test_a_merge_without_an_adapter_is_refused(tmp_path, capsys):
    assert classify.main(["--merge", "--dataset_name=demo", f"--output_dir={tmp_path / 'out'}"]) == 1
    assert "merge: " in capsys.readouterr().err


@pytest.mark.long
def test_a_finetuned_whole_model_names_its_classes(tmp_path):
    recipe, flags = MODELS["distilbert"]("distilbert", tmp_path)
    folder = trained(recipe, [*flags], tmp_path / "out")
    (answer,) = pipeline("text-classification", model=str(folder))(QUESTION)
    assert answer["label"] in NAMES


def test_an_adapter_that_would_lose_statistics_is_refused(tmp_path, capsys):
    recipe, flags = image_classifier("resnet", tmp_path)
    status = recipe.main(
        [*flags, *PLAIN, f"--output_dir={tmp_path / 'out'}", "--use_peft", "--lora_target_modules", "convolution"]
    )
    assert status == 1
    assert "the running statistics of resnet.embedder.embedder.normalization change" in capsys.readouterr().err
