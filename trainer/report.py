"""The loss curve as a picture."""

from pathlib import Path

from .metrics import read_metrics


def draw_loss_curve(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss over steps from a metrics.jsonl into a PNG or SVG (by `picture`'s ending)."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display needed

    records = read_metrics(metrics)
    steps = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    evaluations = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#9ecae1", linewidth=1, label="training, each step")
        axes.plot(*zip(*_smoothed(steps), strict=True), color="#08519c", linewidth=2, label="training, smoothed")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), color="#d94801", marker="o", linewidth=2, label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if steps or evaluations:
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def _smoothed(points: list[tuple[int, float]], window: int = 15) -> list[tuple[int, float]]:
    """Centred moving average; narrower at the ends, so the curve starts and stops where the run does."""
    half = min(window, len(points)) // 2
    means = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        near = [value for _, value in points[i - reach : i + reach + 1]]
        means.append((step, sum(near) / len(near)))
    return means
