"""Pictures of the gate, of mutual information, of filters and of training.

Each function takes axes to draw into, or makes a figure, and returns (Figure, Axes). Colours: cividis and the Okabe-Ito
palette, readable with colour-vision deficiency; what colour tells, shape, dash or text tells too. Many classes and
filters are aggregated, and the picture says how. Dead filters, which have one and the same activation everywhere, have
no class: they stand apart.
"""

from csg_ext.plots.filters import (
    plot_class_agreement,
    plot_filter_similarity,
    plot_filters_per_class,
)
from csg_ext.plots.images import plot_image_filters, plot_top_images
from csg_ext.plots.matrices import (
    class_order,
    plot_class_mutual_information,
    plot_confusion,
    plot_gate,
    plot_mutual_information,
)
from csg_ext.plots.training import plot_training

__all__ = [
    "class_order",
    "plot_class_agreement",
    "plot_class_mutual_information",
    "plot_confusion",
    "plot_filter_similarity",
    "plot_filters_per_class",
    "plot_gate",
    "plot_image_filters",
    "plot_mutual_information",
    "plot_top_images",
    "plot_training",
]
