"""Adapters inside wrapped layers are found: peft 0.21 saves them empty."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from hf_tam.integrations.peft import find_wrapped_adapters  # noqa: E402
from tests.integrations.untouched import tiny_llama  # noqa: E402


class Wrapped(nn.Module):
    """Names its module as torch's wrappers do, which take the name out of those of weights."""

    def __init__(self, module, attribute):
        super().__init__()
        self._attribute = attribute
        setattr(self, attribute, module)
        self._register_state_dict_hook(self._rename)

    def forward(self, *args, **kwargs):
        return getattr(self, self._attribute)(*args, **kwargs)

    @staticmethod
    def _rename(module, state_dict, prefix, metadata):
        for name in [name for name in state_dict if name.startswith(f"{prefix}{module._attribute}.")]:
            state_dict[name.replace(f"{module._attribute}.", "")] = state_dict.pop(name)


@pytest.mark.parametrize("attribute", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_adapter_inside_a_wrapped_layer_is_saved(attribute):
    find_wrapped_adapters()
    find_wrapped_adapters()
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    expected = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = Wrapped(layer, attribute)
    found = peft.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
