"""Towers and nets that are no whole model of transformers: in 4 bits, adapted by name, trained, saved and loaded."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fourbit
from fourbit.lora.layer import adapter_layers

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_attention_heads": 4, "num_mel_bins": 8, "max_source_positions": 8, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


class Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        self.norm, self.dwconv = nn.BatchNorm2d(outside), nn.Conv2d(outside, outside, 3, padding=1, groups=outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(torch.relu(self.norm(self.conv(x))))


class Net(nn.Module):
    """Convolutions, a linear layer on their channels, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 8), Block(8, 8))
        self.mix, self.classifier = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.mix(self.blocks(x).mean((2, 3)))))


class Tagger(nn.Module):
    """Embeddings, a recurrent layer, one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(64, 32, padding_idx=0), nn.GRU(32, 32, batch_first=True)
        self.shared = nn.Linear(32, 32)
        self.twice = self.shared

    def forward(self, ids: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.shared(self.rnn(self.embed(ids))[0])))


def tower(kind: str, settings: dict[str, Any]) -> nn.Module:
    return getattr(transformers, kind)(getattr(transformers, kind).config_class(**settings))


IMAGE = WIDE | {"image_size": 16, "patch_size": 8}
NETS: dict[
    str, tuple[Callable[[], nn.Module], Tensor, list[str], int, int]
] = {  # net, input, target, layers in 4 bits, adapters
    "CLIP's vision tower": (lambda: tower("CLIPVisionModel", IMAGE), IMAGES, ["patch_embedding", "q_proj"], 12, 3),
    "SigLIP's vision tower": (lambda: tower("SiglipVisionModel", IMAGE), IMAGES, ["patch_embedding", "q_proj"], 15, 3),
    "Whisper's encoder": (
        lambda: tower("WhisperModel", WHISPER).encoder,
        IMAGES.reshape(2, 8, -1)[..., :16],
        ["conv1", "conv2", "v_proj"],
        12,
        4,
    ),
    "T5's encoder": (lambda: tower("T5EncoderModel", T5), IDS, ["relative_attention_bias", "q", "wo"], 10, 5),
    "a convolutional net": (Net, IMAGES, ["conv", "dwconv", "mix"], 1, 5),
    "a tagger": (Tagger, IDS, ["embed", "shared"], 1, 2),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return fourbit.quantize_(NETS[name][0]())


def output(net: nn.Module, name: str) -> Tensor:
    found = net(NETS[name][1])
    return found if isinstance(found, Tensor) else found.last_hidden_state


@pytest.mark.parametrize("name", NETS)
def test_a_net_is_quantised_adapted_by_name_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    net, (_, _, target, packed, adapters) = made(name).eval(), NETS[name]
    assert sum(isinstance(layer, fourbit.NF4Linear) for layer in net.modules()) == packed
    start, statistics = output(net, name), {key: tensor.clone() for key, tensor in net.named_buffers()}
    paths = fourbit.attach(net, fourbit.LoRAConfig(rank=8, alpha=8, target=target))
    assert len(paths) == adapters
    torch.testing.assert_close(output(net, name), start, rtol=1e-5, atol=1e-6)  # adapted, a 4-bit layer adds otherwise
    optimizer = fourbit.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = (output(net, name) - torch.linspace(-1, 1, start.shape[-1])).square().mean()
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 3:
            break
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    unused = [
        p for p, layer in adapter_layers(net).items() if not all(t.grad.any() for t in layer.adapters.parameters())
    ]
    assert unused == []
    trained = output(net, name)
    assert not torch.equal(trained, start) and torch.equal(output(copy.deepcopy(net), name), trained)
    fourbit.save_adapter(net, tmp_path)
    again = made(name).eval()
    assert fourbit.load_adapter(again, tmp_path) == paths
    assert torch.equal(output(again, name), trained)
    assert all(torch.equal(tensor, statistics[key.replace(".base.", ".")]) for key, tensor in net.named_buffers())
    fourbit.dequantize(net)
    fourbit.merge(net)
    torch.testing.assert_close(output(net, name), trained, rtol=1e-4, atol=1e-4)
    assert type(net) is type(again) and not adapter_layers(net)
