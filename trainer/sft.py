"""Supervised fine-tuning: chat rows in, an adapter (or a whole model) out."""

from pathlib import Path

from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import InputError
from ..lora.layer import adapter_layers
from ..models.save import save_model
from .config import SFTConfig
from .evaluate import perplexity
from .loop import cross_entropy, trainable
from .losses.tokens import on_device
from .run import template_text
from .step import Sums
from .trainer import Trainer


class SFTTrainer(Trainer):
    """Fine-tunes a model on chat rows.

    model: from `fourbit.load` or transformers, with an adapter attached, or dense with `config.full`.
    loss: (model, batch on its device) -> the value of each trained token, [N], or `Sums`. The rest: see `Trainer`.
    Raises InputError for rows, options or a model that cannot be trained on."""

    config: SFTConfig

    def sums(self, batch: Batch) -> Tensor | Sums:
        if self.loss is None:
            return cross_entropy(self.model, batch)
        return self.loss(self.model, on_device(self.model, batch))

    def describe(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics if self.loss else metrics | {"perplexity": perplexity(metrics["loss"])}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return all_parameters(self.model) if self.config.full else super().trained_parameters()

    def save(self, out: Path) -> None:
        if self.config.full:
            save_model(self.model, out, self.tokenizer, template=template_text(self.train_set))
        else:
            super().save(out)


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter, by name, set to train. Raises InputError for a 4-bit model or one with an adapter."""
    if adapter_layers(model) or any(not p.is_floating_point() for p in model.parameters()):
        raise InputError("full training needs a dense model without an adapter; load it with quant_type=None")
    model.requires_grad_()
    return trainable(model)
