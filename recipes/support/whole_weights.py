"""Weights of a whole model, back from a checkpoint."""

from typing import Any

from transformers import PreTrainedModel, Trainer


class WholeWeights(Trainer):
    """A Trainer that loads its checkpoints as `from_pretrained` does.

    transformers saves ViT, Mixtral and others under the names of their first release, and the Trainer looks for those
    of today: it warns of missing keys, and goes on with the weights that it began with (5.23).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._is_whole():
            self._take_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_whole():
            self._take_weights(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _is_whole(self) -> bool:
        is_cut = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(self.model, PreTrainedModel) and not is_cut

    def _take_weights(self, folder: str) -> None:
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
