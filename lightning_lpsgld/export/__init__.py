"""The ensemble of a bank as one file for another runtime: ONNX, or a torch.export program.

Needs the extra ``export`` (onnx, onnxscript, onnxruntime) for ONNX.
"""

from lightning_lpsgld.export.onnx_file import export_onnx
from lightning_lpsgld.export.outcome import Export
from lightning_lpsgld.export.program import export_program
from lightning_lpsgld.export.weights import PackedTensor, pack

__all__ = ["Export", "PackedTensor", "export_onnx", "export_program", "pack"]
