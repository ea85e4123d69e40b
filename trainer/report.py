"""What a run leaves to look at: its curves as one picture, and the batch that ended it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.batch import Batch
from ..errors import NumericError
from ..files import write_text, write_whole
from ..models.protocol import CausalLM
from ..outputs import check_apart
from .config import TrainingConfig
from .evaluate import nonfinite_layer
from .metrics import read_metrics

PANELS = (  # axis label -> figures drawn against it, where a run has them: in training, and on the validation rows
    ("loss (nats)", ("loss",)),
    ("reward", ("reward",)),
    ("reward", ("reward_chosen", "reward_rejected", "reward_margin")),
    ("accuracy", ("reward_accuracy",)),
    ("log-probability", ("logp_chosen", "logp_rejected")),
    ("KL to the reference", ("kl",)),
    ("tokens an answer", ("answer_tokens",)),
)
COLOURS = ("#08519c", "#a50f15", "#238b45")
Point = tuple[int, float]


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw losses, and rewards and their accuracy where there are any, from a metrics.jsonl into a PNG or SVG."""
    check_apart(picture, f"the picture {picture}", [metrics])
    figure = _curves(metrics)
    write_whole(picture, lambda part: figure.savefig(part, format=picture.suffix[1:] or "png", dpi=120))


def _curves(metrics: Path) -> Any:
    from matplotlib.figure import Figure  # the object interface: no global state, no display needed

    records = read_metrics(metrics)
    panels = [panel for panel in PANELS if panel[0] == PANELS[0][0] or any(_points(records, n) for n in panel[1])]
    figure = Figure(figsize=(9, 1 + 3 * len(panels)), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            _draw(axes, records, name, colour, alone=len(names) == 1)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside: it hides no curve
    figure.axes[0].set_ylim(bottom=min(0.0, figure.axes[0].get_ylim()[0]))  # some losses have no lower bound
    figure.axes[-1].set_xlabel("optimizer step")
    return figure


def nonfinite(
    model: CausalLM, config: TrainingConfig, step: int, sources: list[str], batches: Sequence[Batch], what: str
) -> NumericError:
    """The error that ends a run whose loss or gradient is not finite in too many steps; its last batch goes to a file.
    what: the steps and the last one's numbers, in words."""
    dump = Path(config.out) / f"nonfinite-step-{step}.json"
    rows = {"sources": sources, "input_ids": [batch.input_ids.tolist() for batch in batches]}
    write_text(dump, json.dumps({"step": step, "what": what, **rows}))
    layer = next(filter(None, (nonfinite_layer(model, batch) for batch in batches)), None)
    where = f"; first not finite: the output of {layer}" if layer else ""
    return NumericError(
        f"loss or gradient was not finite in {what}{where}); none changed a weight. The last batch is in {dump}; the "
        f"newest checkpoint is unharmed. Usual causes: lr={config.lr:g} is too high, float16 overflow."
    )


def _draw(axes: Any, records: Sequence[dict[str, Any]], name: str, colour: str, *, alone: bool) -> None:
    steps, evaluations = _points(records, name), _points(records, f"val_{name}")
    if steps and alone:
        axes.plot(*zip(*steps, strict=True), color=colour, alpha=0.3, linewidth=1, label="training, each step")
    if steps:
        label = "training, smoothed" if alone else f"{name.rpartition('_')[2]}, smoothed"
        axes.plot(*zip(*_smoothed(steps), strict=True), color=colour, linewidth=2, label=label)
    if evaluations:
        mark = {"color": "#d94801" if alone else colour, "linestyle": "-" if alone else ":", "marker": "o"}
        label = "validation" if alone else f"{name.rpartition('_')[2]}, validation"
        axes.plot(*zip(*evaluations, strict=True), linewidth=2, label=label, **mark)


def _points(records: Sequence[dict[str, Any]], name: str) -> list[Point]:
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def _smoothed(points: list[Point], window: int = 15) -> list[Point]:
    """Centred moving average; narrower at the ends, so the curve starts and stops where the run does."""
    half = min(window, len(points)) // 2
    means = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        near = [value for _, value in points[i - reach : i + reach + 1]]
        means.append((step, sum(near) / len(near)))
    return means
