"""The picture of the overload sweeps: goodput against offered load, with and without the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from tests.bench.overload import Kind, Sweep

ORDER = get_args(Kind)
PATHS = {"gateway": ("through Tidegate", "#0b6e99", "o"), "direct": ("engine alone", "#b04a2f", "s")}


def draw(sweeps: Mapping[Kind, Sweep], path: Path) -> None:
    """One panel per sweep, in the order of their kinds. Needs matplotlib, from the extra `bench`."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "tidegate"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sweeps), figsize=(4.6 * len(sweeps), 3.2), squeeze=False)
    for panel, sweep in zip(panels[0], sorted(sweeps.values(), key=lambda sweep: ORDER.index(sweep.kind)), strict=True):
        for kind, (label, color, marker) in PATHS.items():
            points = sorted((point.rate, point.goodput) for point in sweep.points if point.path == kind)
            rates, goodputs = zip(*points, strict=True) if points else ((), ())
            panel.plot(rates, goodputs, label=label, color=color, marker=marker, markersize=4)
        panel.axvline(sweep.capacity, color="#888888", linestyle=":", linewidth=1)
        place = {"xy": (sweep.capacity, 0.8), "xycoords": panel.get_xaxis_transform(), "ha": "left", "va": "top"}
        panel.annotate(" capacity", rotation=90, fontsize=7, color="#666666", **place)
        panel.set_title(f"{sweep.about}\n{sweep.slo}", fontsize=8)
        panel.set_xlabel("offered, requests/s", fontsize=8)
        panel.set_ylabel("in time, requests/s", fontsize=8)
        panel.set_ylim(bottom=0, top=1.1 * max((point.goodput for point in sweep.points), default=1.0))
        panel.set_xlim(left=0)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="center right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
