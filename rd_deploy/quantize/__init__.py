"""Post-training quantisation to ONNX with explicit Q/DQ: int8 and float8 (E4M3), for TensorRT and ONNX Runtime.

`quantization_data` finds the images, `quantize_network` calibrates, chooses and judges, `to_qdq` writes the graph.
"""

from rd_deploy.quantize.calibrate import CALIBRATORS, CalibrationError, calibrate
from rd_deploy.quantize.choose import MAX_DROP, AccuracyError, Quantized, quantize_network
from rd_deploy.quantize.data import CALIBRATION_IMAGES, QuantizationData, Samples, quantization_data
from rd_deploy.quantize.qdq import KINDS, qdq_counts, quantizable, stored_bytes, to_qdq

__all__ = [
    "CALIBRATION_IMAGES",
    "CALIBRATORS",
    "KINDS",
    "MAX_DROP",
    "AccuracyError",
    "CalibrationError",
    "QuantizationData",
    "Quantized",
    "Samples",
    "calibrate",
    "qdq_counts",
    "quantizable",
    "quantization_data",
    "quantize_network",
    "stored_bytes",
    "to_qdq",
]
