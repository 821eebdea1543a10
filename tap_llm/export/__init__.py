"""TAP as ONNX files that run without torch: image encoder, region decoder, one step of the caption decoder."""

from .exporting import export_onnx

__all__ = ["export_onnx"]
