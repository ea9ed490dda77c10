# Runs and measures exported models on a CPU with ONNX Runtime and OpenVINO, without torch. From the checkout's root:
#   docker build -f docker/cpu.Dockerfile -t residual-distillation:cpu .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" residual-distillation:cpu a.onnx --compare b.onnx
# The entry point is rd-bench, its working directory /work. Both networks are ONNX files, as rd-export writes them:
# building one from model.pt or from a name takes torch. With torch, for rd-train and rd-export too:
#   docker build -f docker/cpu.Dockerfile -t residual-distillation:cpu-train \
#     --build-arg EXTRAS=openvino,train --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" --entrypoint rd-train residual-distillation:cpu-train
ARG PYTHON=3.12

# The full image has the C++ compiler that the engine takes; only the wheel leaves this stage.
FROM python:${PYTHON}-bookworm AS builder
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
ARG EXTRAS=openvino
ARG TORCH_INDEX=""
COPY constraints.txt /tmp/constraints.txt
COPY --from=builder /wheels /tmp/wheels
# By its path, so that no package of the same name on an index can take its place.
RUN set -- /tmp/wheels/*.whl \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt \
       ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "$1[${EXTRAS}]" \
    && rm -r /tmp/wheels /tmp/constraints.txt

RUN useradd --create-home --uid 10001 rd && install --directory --owner=rd /work
# A user given with --user has no home: matplotlib's cache needs a place that anyone can write.
ENV MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
ENTRYPOINT ["rd-bench"]
CMD ["--help"]
