"""Pictures of samples and trajectories; figures that need no display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nfdm_lightning.processes import Obstacle

_POINT_INK = "#0072B2"  # Okabe and Ito's blue and orange: told apart by everyone
_PATH_INK = "#E69F00"
_START_INK = "#999999"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_array(figure: Figure) -> np.ndarray:
    """Returns a figure's pixels, (H, W, 3) uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def _image_grid(images: Tensor, columns: int) -> np.ndarray:
    from torchvision.utils import make_grid

    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    scale = max(1, math.ceil(32 / images.shape[-1]))  # tiny images are enlarged without smoothing
    grid = make_grid(((images.float() + 1) / 2).clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)
    pixels = (grid * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels.repeat(scale, 0).repeat(scale, 1)


def sample_grid(samples: Tensor, columns: int | None = None, sources: Tensor | None = None) -> np.ndarray:
    """Draws samples: images (N, C, H, W) in [-1, 1] as a grid, points (N, 2) as a scatter plot, vectors as a heat map.

    Args:
        samples: what to draw, (N, *event).
        columns: images per row.
        sources: where a bridge started, (N, *event): images in a row above their samples, points in grey.

    Returns:
        Pixels, (H, W, 3) uint8.
    """
    samples = samples.detach().cpu()
    if samples.ndim == 4:
        columns = columns or math.ceil(math.sqrt(len(samples)))
        return _image_grid(samples if sources is None else _in_turn(sources.detach().cpu(), samples, columns), columns)
    if samples.ndim == 2 and samples.shape[1] == 2:
        figure = _figure(5, 5)
        axes = figure.add_subplot()
        if sources is not None:
            sources = sources.detach().cpu()
            axes.scatter(sources[:, 0], sources[:, 1], s=4, linewidths=0, color=_START_INK, label="sources")
        axes.scatter(samples[:, 0], samples[:, 1], s=4, alpha=0.5, linewidths=0, color=_POINT_INK, label="samples")
        if sources is not None:
            axes.legend(loc="upper right", markerscale=3, fontsize=9)
        axes.set(aspect="equal", title=f"{len(samples)} samples", xlabel="$x_1$", ylabel="$x_2$")
        return to_array(figure)
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    shown = axes.imshow(samples.flatten(1), aspect="auto", cmap="viridis")
    figure.colorbar(shown)
    axes.set(title="samples", xlabel="dimension", ylabel="sample")
    return to_array(figure)


def columns_of(labels: Tensor | None) -> int | None:
    """Returns the images per row that put every class in columns of its own, for labels in turn; None for any number."""
    classes = 0 if labels is None else len(labels.unique())
    return classes if 2 < classes <= 32 else None


def _in_turn(sources: Tensor, samples: Tensor, columns: int) -> Tensor:
    """Rows of sources and of their samples in turn, the last ones filled up with grey."""
    short = -len(samples) % columns
    rows = [
        torch.cat([images, images.new_zeros(short, *images.shape[1:])]).unflatten(0, (-1, columns))
        for images in (sources.to(samples), samples)
    ]
    return torch.stack(rows, 1).flatten(0, 2)


def trajectories(
    times: Tensor, states: Tensor, title: str = "", start: str = "prior", obstacles: Sequence[Obstacle] = ()
) -> np.ndarray:
    """Draws trajectories from t = 1 to t = 0: points as paths over the plane, images as rows with time running right.

    Args:
        times: falling from 1 to 0, (K,).
        states: latents at these times, (K, N, *event).
        title: what is shown.
        start: what stands at t = 1: the prior, or the source of a bridge.
        obstacles: discs in the plane to draw too.

    Returns:
        Pixels, (H, W, 3) uint8.
    """
    times, states = times.detach().cpu(), states.detach().cpu()
    if states.ndim == 5:
        return _image_rows(times, states, title, start)
    from matplotlib.patches import Circle

    figure = _figure(5.4, 5.4)
    axes = figure.add_subplot()
    if states.ndim == 3 and states.shape[2] == 2:
        for disc in obstacles:
            centre = (disc.centre[0], disc.centre[1])
            axes.add_patch(Circle(centre, disc.radius, facecolor="#DDDDDD", edgecolor="#666666", zorder=0))
        for path in states[:, :200].unbind(1):
            axes.plot(path[:, 0], path[:, 1], color=_PATH_INK, linewidth=0.5, alpha=0.5, zorder=1)
        axes.scatter(
            states[0, :, 0], states[0, :, 1], s=4, color=_START_INK, linewidths=0, label=f"t = 1 ({start})", zorder=2
        )
        axes.scatter(states[-1, :, 0], states[-1, :, 1], s=4, color=_POINT_INK, linewidths=0, label="t = 0 (data)", zorder=3)
        axes.set(aspect="equal", title=title, xlabel="$z_1$", ylabel="$z_2$")
        axes.legend(loc="upper right", markerscale=3, fontsize=9)
    else:
        axes.plot(times, states.flatten(2)[:, :20, 0], color=_PATH_INK, linewidth=0.8)
        axes.invert_xaxis()
        axes.set(title=title, xlabel="t", ylabel="first dimension of z")
    return to_array(figure)


def _image_rows(times: Tensor, states: Tensor, title: str, start: str, columns: int = 11, rows: int = 8) -> np.ndarray:
    keep = torch.linspace(0, len(times) - 1, columns).round().long()
    shown = states[keep][:, :rows].transpose(0, 1)
    grid = _image_grid(shown.flatten(0, 1), columns)
    figure = _figure(0.8 * columns, 0.8 * len(shown[:, 0]) + 0.8)
    axes = figure.add_subplot()
    axes.imshow(grid, interpolation="nearest")
    step = grid.shape[1] / columns
    axes.set_xticks([(i + 0.5) * step for i in range(columns)], [f"{float(times[i]):.1f}" for i in keep])
    axes.set_yticks([])
    axes.set(title=title, xlabel=f"t, from the {start} (1) to the data (0)")
    return to_array(figure)


def save_png(pixels: np.ndarray, path: Path) -> None:
    """Writes pixels (H, W, 3) as a PNG; the file appears whole or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    partial.replace(path)
