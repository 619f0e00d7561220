"""Image data: the embedded default, readers of the usual layouts, reproducible batches in memory and streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csg_ext.data.batches import Batches
from csg_ext.data.images import ImageData, load_images

if TYPE_CHECKING:
    from csg_ext.data.loader import ImageLoader as ImageLoader
    from csg_ext.data.loader import image_loader as image_loader

__all__ = ["Batches", "ImageData", "load_images"]


def __getattr__(name: str) -> Any:
    """Imports what needs Pillow only when it is asked for."""
    if name in ("ImageLoader", "image_loader"):
        from csg_ext.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
