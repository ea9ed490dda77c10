# Trains, exports and measures on an NVIDIA GPU, with NVIDIA's own TensorRT. From the checkout's root:
#   docker build -f docker/gpu.Dockerfile -t residual-distillation:gpu .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" residual-distillation:gpu rd-train --out runs/gpu
# The entry point is NVIDIA's, which checks the driver and runs the command given; the working directory is /work.
# 26.08 holds TensorRT 11.2.1, CUDA 13.3 and Python 3.12. An engine runs only in the TensorRT that built it, so the
# tag is pinned and the image's TensorRT stays: the [tensorrt] and [gpu] extras, which would bring PyPI's, are not used.
# cuda-core is what `rd_deploy.trt.session` runs engines with.
FROM nvcr.io/nvidia/tensorrt:26.08-py3
ARG EXTRAS=train,tensorboard

# The version of a Debian package follows the base image's tag.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An environment that sees the image's packages: pip can add to them, but not replace them.
RUN python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1

WORKDIR /src
COPY . .
# onnxruntime and onnxruntime-gpu unpack into one folder: the first goes before the second comes (1.31 is for CUDA 13).
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" cuda-core \
    && pip uninstall --yes onnxruntime \
    && pip install --no-cache-dir --no-deps onnxruntime-gpu==1.31.1 \
    && python -c "import importlib.util as u, sys; t = u.find_spec('tensorrt'); sys.exit(t is None or t.origin.startswith('/opt/venv'))"

RUN useradd --create-home --uid 10001 rd && install --directory --owner=rd /work
USER 10001
WORKDIR /work
CMD ["rd-train", "--help"]
