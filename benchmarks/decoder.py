"""A random decoder from one set of 4-bit weights: ours and transformers' over the same bytes, for layer and step."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fourbit
from fourbit.kernels.weight4bit import Weight4bit
from fourbit.models.decoder import Decoder as Model
from fourbit.models.spec import Rope, Spec

from .cases import Setting
from .peers import bnb, dense, peft_lora
from .shapes import Decoder
from .weights import Weights

ALPHA = 32.0
LINEARS = {  # transformers' and our names of a layer's linears -> the projection of shapes.Decoder
    "self_attn.q_proj": "q/o",
    "self_attn.k_proj": "k/v",
    "self_attn.v_proj": "k/v",
    "self_attn.o_proj": "q/o",
    "mlp.gate_proj": "gate/up",
    "mlp.up_proj": "gate/up",
    "mlp.down_proj": "down",
}


@dataclass(frozen=True)
class Parts:
    """Everything random about the decoder, made once. `layers` may be fewer than the decoder has."""

    shape: Decoder
    layers: int
    rank: int
    setting: Setting
    vocabulary: int

    @cached_property
    def weights(self) -> dict[str, Weights]:
        """By projection; every linear of every layer has bytes of its own, equal for equal shapes."""
        uses = [projection for projection in LINEARS.values() for _ in range(self.layers)]
        return {
            p.name: Weights.random(p.N, p.K, self.setting.device, uses.count(p.name), seed=i)
            for i, p in enumerate(self.shape.projections())
        }

    @cached_property
    def embedding(self) -> Tensor:
        return self.setting.normal(self.vocabulary, self.shape.hidden, seed=11)

    @cached_property
    def head(self) -> Tensor:
        return self.setting.normal(self.vocabulary, self.shape.hidden, seed=12, scale=self.shape.hidden**-0.5)

    def places(self) -> list[tuple[int, str, Weights, int]]:
        """(layer, name of the linear, its weights, which copy) of every linear."""
        taken = dict.fromkeys(self.weights, 0)
        found = []
        for layer in range(self.layers):
            for name, projection in LINEARS.items():
                found.append((layer, name, self.weights[projection], taken[projection]))
                taken[projection] += 1
        return found

    def stored(self) -> list[tuple[int, str, Weights, Weight4bit]]:
        return [(layer, name, weights, weights.copies[i]) for layer, name, weights, i in self.places()]


def ours(parts: Parts, *, quantised: bool = True, dropout: float = 0.0, dtype: torch.dtype | None = None) -> Model:
    """Our decoder with LoRA on every linear, in 4 bits or over the decoded dense weights, in training mode."""
    dtype = dtype or parts.setting.dtype
    shape = parts.shape
    with torch.device("meta"):
        model = Model(
            Spec(
                vocab_size=parts.vocabulary,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=parts.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.key_heads,
                head_dim=shape.head_dim,
                rope=Rope(500000.0),
            )
        )
    for layer, name, weights, copy in parts.places():
        place, _, leaf = name.partition(".")
        holder = getattr(model.model.layers[layer], place)
        # A wider dtype is for the truth: it computes with the weight as the run's dtype rounds it.
        matrix = weights.layer(copy) if quantised else dense.module(weights.decoded(parts.setting.dtype).to(dtype))
        setattr(holder, leaf, matrix)
    fill_outside(model, parts, dtype)
    config = fourbit.LoRAConfig(rank=parts.rank, alpha=ALPHA, dropout=dropout)
    fourbit.attach(model, config, dtype=torch.promote_types(dtype, torch.float32))
    return model.train()


def fill_outside(model: Any, parts: Parts, dtype: torch.dtype) -> None:
    """Embedding, head and norms: the same tensors for every model of these parts in this dtype."""
    model.model.embed_tokens.weight = nn.Parameter(parts.embedding.to(dtype), requires_grad=False)
    model.lm_head.weight = nn.Parameter(parts.head.to(dtype), requires_grad=False)
    ones = torch.ones(parts.shape.hidden, device=parts.setting.device, dtype=dtype)
    norms = [model.model.norm]
    for layer in model.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.weight = nn.Parameter(ones, requires_grad=False)


def randomise(model: nn.Module, scale: float = 0.05) -> None:
    """B, which starts at zero, gets random values, so that every gradient says something."""
    for i, (_, module) in enumerate(fourbit.lora.layer.adapters_of(model).items()):
        generator = torch.Generator(module.lora_B.device).manual_seed(100 + i)
        values = torch.randn(module.lora_B.shape, device=module.lora_B.device, generator=generator)
        module.lora_B.data.copy_(scale * values)


def transformers(parts: Parts, adapters: Model, *, quantised: bool = True, dropout: float = 0.0) -> Any:
    """transformers' Llama over bitsandbytes (or dense) linears with peft's LoRA, its adapters those of our model."""
    from transformers import LlamaConfig as PeerConfig
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape, setting = parts.shape, parts.setting
    config = PeerConfig(
        vocab_size=parts.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=parts.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-6,
        rope=Rope(500000.0),
        attn_implementation="sdpa",
        use_cache=False,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with torch.device(setting.device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    for layer, name, weights, stored in parts.stored():
        place, _, leaf = name.partition(".")
        if quantised:
            linear = bnb.module(stored, (weights.N, weights.K), setting.dtype)
        else:
            linear = dense.module(weights.decoded(setting.dtype))
        setattr(getattr(model.model.layers[layer], place), leaf, linear)
    fill_outside(model, parts, setting.dtype)
    names = [name.rpartition(".")[2] for name in LINEARS]
    peft_lora.attach(model, parts.rank, ALPHA, dropout, names)
    for name, ours_ in fourbit.lora.layer.adapters_of(adapters).items():
        A, B = ours_.lora_A.detach().to(setting.dtype), ours_.lora_B.detach().to(setting.dtype)
        peft_lora.set_adapter(model.get_submodule(name), A, B)
    return model.train()
