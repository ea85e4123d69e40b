"""What a decoder computes, as data. A family is a function from its `config.json` to a `Spec`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InputError


@dataclass(frozen=True)
class Rope:
    """Rotary positions: frequencies theta^(-2i / dim), i = 0 .. dim/2 - 1, and how they are stretched for long texts.

    kind: "linear" divides every frequency by `factor`; "llama3" (Llama 3.1) only the slow ones, and blends in a band;
    "yarn" (Peng et al. 2023) likewise, over pairs of between `beta_fast` and `beta_slow` turns; "dynamic" raises theta
    with the length of texts above `original_max_position_embeddings`; "longrope" (Ding et al. 2024) divides each
    frequency by its `short_factor`, in longer texts than that by its `long_factor`; a cache keeps keys as these two
    turned them when the text was shorter. `attention_factor` multiplies queries and keys. Other fields are of their
    kinds alone."""

    theta: float = 10000.0
    dim: int = 0  # of a head that turn; 0: all
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # whether yarn's band is of whole dimensions
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class Spec:
    """Shape and constants of a decoder; the names are those of `config.json`. InputError where numbers contradict.

    model_type: the family whose words `config` is in: the keys that the Spec was read from, empty where it was not.
    norms: where a layer's parts are normalised: "before" each, "after" it (OLMo 2), or "both" (Gemma). norm_plus_one:
    norms multiply by 1 + weight. qk_norm: queries and keys are normalised before they turn, each "head" (Qwen 3) or
    all of a token's together, its "row" (OLMo 2). fused: one projection makes q, k and v, one gate and up (Phi).
    windows: of each layer the tokens that a query sees, its own included, 0: all; empty: all in every layer.
    local_rope: of the layers with a window, where it is another one. no_rope: layers whose q and k do not turn.
    attention_scale: of q k^T, None: 1 / sqrt(head_dim). Soft caps, 0 for none: c tanh(x / c) of what goes into the
    softmax and of the logits. embedding_scale and residual_scale multiply what they say, logit_divisor divides logits.
    num_experts: of each layer, or 0; norm_topk_prob: whether the weights of a token's experts sum to 1."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    local_rope: Rope | None = None
    no_rope: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of o
    mlp_bias: bool = False
    fused: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Literal["before", "after", "both"] = "before"
    norm_plus_one: bool = False
    qk_norm: Literal["", "head", "row"] = ""
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        if heads % kv:
            raise InputError(f"config: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv}).")
        for size, what in ((self.head_dim, "head_dim"), (self.rope.dim or 2, "the part of a head that turns")):
            if size % 2 or size <= 0:
                raise InputError(f"config: {what} must be even and positive (RoPE turns pairs), got {size}.")

    def window(self, layer: int) -> int:
        """Tokens that a query of this layer sees; 0: all."""
        return self.windows[layer] if self.windows else 0
