"""Supervised fine-tuning: chat rows in, an adapter (or a whole model) out."""

from pathlib import Path

import torch
from torch import nn

from ..data.batch import Batch
from ..errors import InputError
from ..lora.adapter import adapter_layers, plain_name, unwrapped
from ..models.save import save_model
from .config import SFTConfig
from .evaluate import perplexity
from .losses.tokens import batch_token_scores, summed
from .run import template_text
from .step import Sums
from .trainer import Trainer, Weights


class SFTTrainer(Trainer):
    """Fine-tunes a model on chat rows.

    model: from `fourbit.load`, with an adapter attached, or dense with `config.full`.
    train: a JSONL file, several, or a Dataset. val: the same, or a fraction of train below 1, or None.
    Raises InputError for rows, options or a model that cannot be trained on.
    """

    config: SFTConfig

    def sums(self, batch: Batch) -> Sums:
        scores = batch_token_scores(self.model, batch)
        metrics = {"token_accuracy": summed(scores.correct), "entropy": summed(scores.entropy)}
        return Sums(-scores.logps.sum(dtype=torch.float64), metrics)

    def describe(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics | {"perplexity": perplexity(metrics["loss"])}

    # With `full` all weights are trained instead of an adapter.

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return all_parameters(self.model) if self.config.full else super().trained_parameters()

    def weights(self) -> Weights:
        return {n: p.detach() for n, p in self.parameters.items()} if self.config.full else super().weights()

    def load_weights(self, state: Weights) -> None:
        if not self.config.full:
            super().load_weights(state)
            return
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])

    def save(self, out: Path) -> None:
        if self.config.full:
            save_model(self.model, self.tokenizer, out, template=template_text(self.train_set))
        else:
            super().save(out)


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter, by name, set to train. Raises InputError for a 4-bit model or one with an adapter."""
    if adapter_layers(model) or any(not p.is_floating_point() for p in model.parameters()):
        raise InputError(
            "full training needs a dense model without an adapter; load it with quant_type=None (--quant none)"
        )
    model.requires_grad_()
    return {plain_name(name): parameter for name, parameter in unwrapped(model).named_parameters()}
