"""The figures of docs/how-it-works.md: `python -m benchmarks.figures`. Drawn from the package's own functions."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from fourbit import nf4
from fourbit.kernels.codes import fp4_code, nf4_code

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
COLOURS = {"nf4": "#08519c", "fp4": "#d94801"}


def draw_codes(path: Path) -> None:
    """Both code tables as ticks under a normal density scaled to its expected largest of 64."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    x = torch.linspace(-1, 1, 400)
    spread = 1 / torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)).abs().amax(1).mean()
    axes.fill_between(x, torch.exp(-0.5 * (x / spread) ** 2), color="#deebf7", label="weights / absmax, normal")
    for place, (name, code) in enumerate({"nf4": nf4_code(), "fp4": fp4_code()}.items()):
        low, high = -0.16 - 0.2 * place, -0.02 - 0.2 * place
        axes.vlines(code, low, high, color=COLOURS[name], linewidth=2, label=name.upper())
    axes.set_yticks([])
    axes.set_xlabel("value, in units of the block's absmax")
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, metadata={"Date": None})


def draw_blocksizes(path: Path) -> None:
    """Relative error and bits per weight over the block size, on normal weights, with double quantisation."""
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for quant_type, colour in COLOURS.items():
        points = [error_and_bits(weight, quant_type, 2**power) for power in range(5, 13)]
        errors, bits_each = zip(*points, strict=True)
        axes.plot(bits_each, errors, "o-", color=colour, label=quant_type.upper())
        for power, (error, bits) in zip(range(5, 13), points, strict=True):
            if power in (5, 6, 8, 12):
                axes.annotate(f"{2**power}", (bits, error), textcoords="offset points", xytext=(3, 5), color=colour)
    axes.set_xlabel("bits per weight, scales double-quantised (block size beside each point)")
    axes.set_ylabel("error / weight norm")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def error_and_bits(weight: torch.Tensor, quant_type: str, blocksize: int) -> tuple[float, float]:
    """Relative Frobenius error, and bits per weight of everything stored."""
    stored = nf4.quantize(weight, quant_type, blocksize, double_quant=True)
    bits = sum(8 * tensor.nbytes for tensor in stored[:4]) / weight.numel()
    return float((nf4.dequantize(stored) - weight).norm() / weight.norm()), bits


if __name__ == "__main__":
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "fourbit"  # the same file each time
    FIGURES.mkdir(exist_ok=True)
    draw_codes(FIGURES / "codes.svg")
    draw_blocksizes(FIGURES / "blocksize.svg")
    print(f"drew {FIGURES}/codes.svg and blocksize.svg")
