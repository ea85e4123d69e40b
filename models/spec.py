"""What a decoder computes, as data. A family is a function from its `config.json` to a `Spec` and back."""

from dataclasses import dataclass

from ..errors import InputError

# Kind of scaling -> the fields that it uses, which are also its keys in `config.json`.
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    `kind` "linear" divides every frequency by `factor`; "llama3" (Llama 3.1) only the slow ones, and blends in a band.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Spec:
    """Shape and constants of a decoder; the names are those of `config.json`.

    `model_type`: the family whose words `config.json` speaks. `qk_norm`: queries and keys are normalised (RMS, a weight
    for each element of a head) before they are turned. Raises InputError for numbers that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise InputError(
                f"config: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})."
            )
        if self.head_dim % 2 or self.head_dim == 0:
            raise InputError(f"config: head_dim must be even and positive (RoPE turns pairs), got {self.head_dim}.")
