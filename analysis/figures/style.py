"""How every figure looks: its colours, line styles, fonts and sizes. Imports no library."""

from dataclasses import dataclass
from typing import Any, Literal

# Okabe and Ito (2008): told apart by readers of every colour vision
BLUE, VERMILLION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#777777"

CYCLE = (BLUE, VERMILLION, GREEN, PINK, AMBER, SKY, BLACK)  # of curves side by side
MAIN = BLUE  # what a figure is about
PALE = SKY  # the same, spread out behind it
REFERENCE = VERMILLION  # what it is held against: uniform, a threshold, a mean
NATIVE = GREEN  # the model's own top-k
GRID = "#e4e4e4"
ORDERED = "viridis"  # shares, and layers from the first to the last
DIVERGING = "PuOr"  # differences around 0

MIN_K_LINE, MAX_K_LINE = ":", "--"
NATIVE_LINE = (0, (6, 1.5, 1, 1.5))

MOST_LAYERS, MOST_EXPERTS = 64, 128  # drawn one by one; beyond, neighbours share a place
SMALLEST_P = 1e-8  # smaller p-values are drawn at it


@dataclass(frozen=True)
class Style:
    """Resolution, type and layout of a figure.

    Attributes:
        dpi: dots an inch of images, and of pictures inside SVG and PDF.
        font: size of text in points; on a page 7 inches wide it is legible at half width.
        layout: "constrained" makes room for every label, in half of the time that a figure takes;
            None leaves panels where they are, for drafts.
    """

    dpi: float = 150
    font: float = 11
    layout: Literal["constrained"] | None = "constrained"

    @property
    def settings(self) -> Any:  # a dict; its keys have a type of their own in matplotlib
        """As matplotlib's rcParams."""
        small = self.font - 1
        return {
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.labelsize": self.font,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": self.font,
            "figure.dpi": self.dpi,
            "figure.titlesize": self.font,
            "font.size": self.font,
            "grid.color": GRID,
            "grid.linewidth": 0.6,
            "image.cmap": ORDERED,
            "image.interpolation": "nearest",
            "legend.fontsize": small,
            "legend.frameon": True,
            "legend.framealpha": 0.85,
            "legend.edgecolor": "none",
            "pdf.fonttype": 42,  # text stays text: journals ask for it
            "svg.fonttype": "none",
            "xtick.labelsize": small,
            "ytick.labelsize": small,
        }


STYLE = Style()
