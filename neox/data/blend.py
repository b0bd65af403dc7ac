"""The earlier path of `neox.data.samples.blend`, for programs written before the data package was split."""

from neox.data.samples.blend import Blend, BlendedDataset

__all__ = ["Blend", "BlendedDataset"]
