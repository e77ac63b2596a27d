"""The loss curve as a picture: training and validation loss, and the learning rate below."""

from __future__ import annotations

from pathlib import Path

from mindspeed.training.history import History

_TRAIN, _VALIDATION, _RATE = "#2a6f97", "#d1495b", "#6c757d"


def loss_curve(history: History, path: Path, title: str = "") -> Path | None:
    """Draw the curve of a run.

    Returns:
        The file written, or None when there is nothing to draw or matplotlib is not installed.
    """
    train = history.of("train")
    if not train:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = [point.iteration for point in train]
    marker = "o" if len(train) < 40 else ""
    label = f"training, {train[-1].loss:.3f} at step {steps[-1]}"  # in the legend: beside the last point curves meet
    loss_axes.plot(steps, [point.loss for point in train], color=_TRAIN, marker=marker, markersize=3, label=label)
    for kind, color, symbol in (("validation", _VALIDATION, "D"), ("test", _RATE, "s")):
        if points := history.of(kind):
            xs, ys = [point.iteration for point in points], [point.loss for point in points]
            loss_axes.plot(xs, ys, color=color, marker=symbol, markersize=5, linestyle="--", label=kind)
    loss_axes.margins(y=0.12)
    loss_axes.set_ylabel("loss (nats per token)")
    loss_axes.legend(frameon=False)
    rate_axes.plot(steps, [point.learning_rate for point in train], color=_RATE)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("step")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
