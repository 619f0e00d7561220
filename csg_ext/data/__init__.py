"""Image data: the embedded default, readers of the usual layouts, and reproducible augmented batches."""

from csg_ext.data.batches import Batches
from csg_ext.data.images import ImageData, load_images

__all__ = ["Batches", "ImageData", "load_images"]
