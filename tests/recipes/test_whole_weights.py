"""A whole model goes on from its checkpoint, and back to its best one, also where it is saved under other names."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainingArguments

from recipes.support.whole_weights import WholeWeights
from tests.recipes.test_target_loss import image_classifier


@pytest.fixture
def trainer(tmp_path):
    """A Trainer of a ViT that differs from the one in `folder/checkpoint`."""
    image_classifier("vit", tmp_path / "checkpoint")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return WholeWeights(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


@pytest.mark.parametrize("way", ["resume", "best"])
def test_every_weight_comes_back(way, trainer, tmp_path):
    folder = str(tmp_path / "checkpoint")
    saved = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    # else there is nothing to test: the Trainer's own way would do
    assert not load_file(f"{folder}/model.safetensors").keys() & {name for name in saved if ".layers." in name}
    if way == "resume":
        trainer._load_from_checkpoint(folder)
    else:
        trainer.state.best_model_checkpoint = folder
        trainer._load_best_model()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())
