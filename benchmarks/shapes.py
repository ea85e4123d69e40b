"""What is measured: the linear layers of three models, numbers of rows, ranks, dropout, and a whole decoder."""

from dataclasses import dataclass, replace

import torch

from .timing import LEAST_ROUNDS


@dataclass(frozen=True)
class Projection:
    """One linear layer, weight [N, K]; equal ones (q and o, gate and up) are measured once."""

    model: str
    name: str
    N: int
    K: int

    @property
    def weights(self) -> int:
        return self.N * self.K


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder, for the whole layer and the whole training step."""

    model: str
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    layers: int

    def projections(self) -> tuple[Projection, ...]:
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        sizes = {
            "q/o": (queries, self.hidden),
            "k/v": (keys, self.hidden),
            "gate/up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }
        return tuple(Projection(self.model, name, *size) for name, size in sizes.items())

    def layer_weights(self) -> int:
        """Weights in the linear layers of one decoder layer."""
        return self.hidden * (2 * self.heads + 2 * self.key_heads) * self.head_dim + 3 * self.hidden * self.intermediate


LLAMA_8B = Decoder("Llama-3-8B", 4096, 14336, 32, 8, 128, 128256, 32)
QWEN_7B = Decoder("Qwen2.5-7B", 3584, 18944, 28, 4, 128, 152064, 28)
LLAMA_70B = Decoder("Llama-3-70B", 8192, 28672, 64, 8, 128, 128256, 80)
LLAMA_1B = Decoder("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256, 16)
SMOLLM2 = Decoder("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, 30)


@dataclass(frozen=True)
class Grid:
    """The points of a run. `decoder` is that of the layer and the step, which see `tokens` tokens (or each of them)."""

    projections: tuple[Projection, ...]
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    decoder: Decoder
    tokens: tuple[int, ...]
    dtype: torch.dtype
    seconds: float  # all of it, building and checking included
    case_seconds: float  # timing of one case
    least_rounds: int = LEAST_ROUNDS


CUDA = Grid(
    projections=(*LLAMA_8B.projections(), *QWEN_7B.projections(), *LLAMA_70B.projections()),
    rows=(1, 4, 16, 64, 256, 512, 1024, 2048, 8192),
    ranks=(16, 64),
    dropouts=(0.0, 0.05),
    decoder=LLAMA_8B,
    tokens=(2048, 8192),
    dtype=torch.bfloat16,
    seconds=540,
    case_seconds=0.6,
)
CUDA_QUICK = replace(
    CUDA,
    rows=(1, 16, 64, 512, 2048, 8192),
    ranks=(16,),
    dropouts=(0.0,),
    tokens=(2048,),
    seconds=105,
    case_seconds=0.25,
)
CPU = Grid(
    projections=(*SMOLLM2.projections(), LLAMA_8B.projections()[0]),
    rows=(1, 16, 256),
    ranks=(16,),
    dropouts=(0.0, 0.05),
    decoder=SMOLLM2,
    tokens=(256,),
    dtype=torch.float32,
    seconds=540,
    case_seconds=6,
)
CPU_QUICK = replace(
    CPU,
    projections=SMOLLM2.projections()[2:],
    dropouts=(0.0,),
    decoder=replace(SMOLLM2, model="4 layers of SmolLM2-135M", layers=4),
    tokens=(64,),
    seconds=105,
    case_seconds=1,
)


def grid_for(device: torch.device, quick: bool) -> Grid:
    """The default points of a device: bf16 on CUDA, fp32 (the compute dtype of the CPU recipes) on a CPU."""
    if device.type == "cuda":
        return CUDA_QUICK if quick else CUDA
    return CPU_QUICK if quick else CPU
