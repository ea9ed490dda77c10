"""TensorRT engines of both flavours, enterprise TensorRT and TensorRT-RTX: build, describe, check, run."""

SUFFIX = ".engine"
