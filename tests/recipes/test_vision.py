"""vision.py: the embedded digits with every architecture, folders of images, and a run that was stopped."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer

from recipes.support import image_data
from recipes.vision import main
from tests.recipes.test_task_configs import tiny_images


@pytest.fixture
def vision(tmp_path, capsys):
    """Run vision.py in this process; returns status, stdout and stderr."""

    def run(*arguments):
        flags = [f"--output_dir={tmp_path / 'out'}", "--disable_tqdm=true", "--use_cpu=true", "--save_strategy=no"]
        return main([*flags, *map(str, arguments)]), *capsys.readouterr()

    run.output_dir = tmp_path / "out"
    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "least"),
    [
        (("--num_train_epochs", 2), 0.8),
        pytest.param((), 0.95, marks=pytest.mark.slow),
        pytest.param(("--architecture", "vit"), 0.8, marks=pytest.mark.slow),
        pytest.param(("--architecture", "mobilenet_v2"), 0.8, marks=pytest.mark.slow),
    ],
    ids=["resnet-short", "resnet", "vit", "mobilenet_v2"],
)
def test_embedded_default_reads_digits_it_has_not_seen(flags, least, vision):
    status, output, error = vision("--eval_strategy", "no", *flags)
    assert status == 0, error
    assert "This is the demo" in output
    results = results_of(vision.output_dir)
    assert results["optimizer"] == "AdaTAMW"
    assert results["test_most_frequent_class"] < 0.11
    assert results["test_accuracy"] > least
    assert results["test_macro_f1"] > least - 0.1


@pytest.mark.long
def test_saved_model_gives_the_reported_accuracy(vision):
    """Weights, running statistics of BatchNorm and what prepares the images, as transformers loads them."""
    assert vision("--num_train_epochs", 1, "--eval_strategy", "no")[0] == 0
    model = AutoModelForImageClassification.from_pretrained(vision.output_dir).eval()
    processor = AutoImageProcessor.from_pretrained(vision.output_dir)
    test = image_data.encode(image_data.demo_records()[2], processor)
    with torch.no_grad():
        predicted = model(pixel_values=test[:]["pixel_values"]).logits.argmax(dim=1)
    accuracy = float((predicted == torch.tensor(test[:]["labels"])).float().mean())
    assert accuracy == pytest.approx(results_of(vision.output_dir)["test_accuracy"])
    assert int(model.state_dict()["resnet.embedder.embedder.normalization.num_batches_tracked"]) == 38


def test_digits_are_in_one_split_each():
    splits = image_data.demo_records()
    images = [[image["bytes"] for image in split.dataset["image"]] for split in splits]
    assert [len(split) for split in images] == [1197, 200, 400]
    assert not set(images[0]) & set(images[2])


def make_folder(folder, **classes):
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            level = 40 + 20 * index
            Image.fromarray(np.full((20, 20, 3), level, dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.long
def test_lora_trains_adapter_and_head(vision, tmp_path):
    status, _, error = vision(*tiny_images(tmp_path), "--max_steps", 2, "--use_peft")
    assert status == 0, error
    adapter = json.loads((vision.output_dir / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] == ["classifier"]
    names = list(load_file(vision.output_dir / "adapter_model.safetensors"))
    assert any("classifier" in name for name in names)
    assert any("query.lora_A" in name or "q_proj.lora_A" in name for name in names)


@pytest.mark.long
def test_folder_named_like_a_split_is_a_class(vision, tmp_path):
    folder = make_folder(tmp_path / "images", train=3, test=3)
    arguments = ["--architecture", "resnet", "--train_folder", folder, "--test_folder", folder]
    status, _, error = vision(*arguments, "--max_steps", 1)
    assert status == 0, error
    labels = json.loads((vision.output_dir / "config.json").read_text())["id2label"]
    assert labels == {"0": "test", "1": "train"}


def test_classes_of_the_test_are_numbered_as_in_training(vision, tmp_path):
    train, test = make_folder(tmp_path / "a", cat=2, dog=2, owl=2), make_folder(tmp_path / "b", dog=1, owl=1)
    data = image_data.VisionDataArguments(train_folder=str(train), test_folder=str(test))
    splits, names = image_data.load_splits(data, seed=0, evaluates=False)
    assert names == ["cat", "dog", "owl"]
    assert list(splits["test"].dataset["label"]) == [1, 2]


def corrupt(folder):
    (folder / "cat" / "0.png").write_text("no image")
    return folder


BAD_FOLDERS = {
    "missing": (lambda folder: folder / "nowhere", (), "no such folder"),
    "empty": (lambda folder: make_folder(folder, cat=0), (), "holds no images"),
    "one class": (lambda folder: make_folder(folder, cat=2), (), "the single class 'cat'"),
    "corrupt": (lambda folder: corrupt(make_folder(folder, cat=2, dog=2)), (), "cat/0.png cannot be read as an image"),
    "adapter": (lambda folder: make_folder(folder, cat=2, dog=2), ("--use_peft",), "starts from random weights"),
    "evaluation": (lambda folder: make_folder(folder, cat=2, dog=2), ("--eval_strategy", "epoch"), "needs data"),
}


@pytest.mark.parametrize(("make", "flags", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folder_is_one_clear_error_before_anything_is_written(make, flags, message, vision, tmp_path):
    folder = make(tmp_path / "images")
    arguments = ["--architecture", "resnet", "--train_folder", folder, "--test_folder", folder]
    status, _, error = vision(*arguments, *flags)
    assert status == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not vision.output_dir.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "demo"], "no model: give --model_name_or_path"),
        (
            ["--dataset_name", "demo", "--model_name_or_path", "nobody/nothing"],
            "model 'nobody/nothing' cannot be loaded",
        ),
        (["--model_name_or_path", "nobody/nothing"], "no training"),
    ],
)
def test_what_was_named_is_never_replaced(flags, message, vision):
    status, _, error = vision(*flags)
    assert status == 1
    assert message in error
    assert not vision.output_dir.exists()


def test_class_that_training_does_not_have_is_named(vision, tmp_path):
    train, test = make_folder(tmp_path / "a", cat=2, dog=2), make_folder(tmp_path / "b", cat=1, yak=1)
    status, _, error = vision("--architecture", "resnet", "--train_folder", train, "--test_folder", test)
    assert status == 1
    assert "the class 'yak' does not occur in the training images" in error


def test_directory_in_use_is_refused(vision):
    vision.output_dir.mkdir()
    (vision.output_dir / "mine").touch()
    status, _, error = vision("--dataset_name", "demo", "--architecture", "resnet")
    assert status == 1
    assert "is not empty" in error


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["resnet", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_run_stopped_by_sigterm_continues_bit_for_bit(architecture, vision, tmp_path, monkeypatch):
    """With BatchNorm's running statistics and, in MobileNetV2, dropout."""
    flags = ["--dataset_name=demo", f"--architecture={architecture}", "--max_steps=4", "--save_steps=4"]
    flags += ["--max_train_samples=64", "--learning_rate=1e-2"]
    step = Trainer.training_step
    assert vision(*flags, f"--output_dir={tmp_path / 'whole'}", "--save_strategy=steps")[0] == 0

    def stop_in_step_2(trainer, *arguments):
        if trainer.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", stop_in_step_2)
        with pytest.raises(SystemExit) as leaving:
            vision(*flags)
    assert leaving.value.code == 128 + signal.SIGTERM
    assert (vision.output_dir / "checkpoint-2").is_dir()
    assert vision(*flags, "--save_strategy=steps", "--resume_from_checkpoint=true")[0] == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (vision.output_dir, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
