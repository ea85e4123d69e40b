"""A vision transformer in 4 bits learns which way stripes run: LoRA and a fresh head, in a loop of one's own.

`python examples/vision/classify.py` takes some seconds on a CPU, and needs transformers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import fourbit

CLASSES = 4  # directions: 0, 45, 90, 135 degrees


def stripes(count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Noisy images [count, 1, size, size] of stripes at a random place and width, and their directions [count]."""
    labels = torch.randint(CLASSES, (count,))
    angle, phase = labels * math.pi / CLASSES, torch.rand(count) * 2 * math.pi
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    across = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    waves = torch.sin((6 + 6 * torch.rand(count))[:, None, None] * across + phase[:, None, None])
    return (waves + 0.5 * torch.randn_like(waves))[:, None], labels


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """The share of `images` [N, 1, H, W] whose likeliest class is the one in `labels` [N]."""
    return (model.eval()(images).logits.argmax(-1) == labels).float().mean().item()


def main(folder: str = "stripes", steps: int = 80) -> tuple[float, float]:
    """Train so many steps and save into `folder`; the share of right answers on new images, before and after."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(image_size=32, patch_size=4, num_channels=1, num_labels=CLASSES, **size)
    model = ViTForImageClassification(config)  # or from_pretrained("folder", num_labels=CLASSES)
    fourbit.quantize_(model)  # the encoder's linear layers; the head stays dense
    target = ["projection", "q_proj", "v_proj", "fc1", "fc2"]  # the first is the convolution that cuts patches
    fourbit.attach(model, fourbit.LoRAConfig(rank=8, target=target, modules_to_save=["classifier"]))
    optimizer = fourbit.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)

    before = accuracy(model, *(held_out := stripes(400)))
    for step in range(steps):
        images, labels = stripes(32)
        loss = F.cross_entropy(model.train()(images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")
    after = accuracy(model, *held_out)
    print(f"right answers: {before:.1%} before, {after:.1%} after")
    fourbit.save_adapter(model, folder)  # LoRA and the head, in peft's format
    return before, after


if __name__ == "__main__":
    main()
