"""The text of a Triton model's ``config.pbtxt``: protobuf text of the server's message `ModelConfig`.

The fields are those of model_config.proto (github.com/triton-inference-server/common); what the server and its backends
make of them is taken from their documentation and sources of July 2026.
"""

import json

# How long a request may wait for company, in microseconds: little beside the milliseconds that a network takes.
QUEUE_DELAY_US = 100
DATA_TYPES = {"float32": "TYPE_FP32"}  # whatever the precision inside, images and logits are fp32
LABELS = "labels.txt"

HEADER = "# Written by rd-export, which will not replace a file that was edited."
ONNX_SETTINGS = """\
# One instance per GPU or, without a GPU, one on the CPU (the default, two, would share its cores). KIND_CPU: the CPU,
# even where there is a GPU.
instance_group [ { kind: KIND_AUTO count: 1 } ]
# On a GPU: cuDNN's algorithms by heuristics (1). The default tries all of them, again for each new batch size."""
ONNX_PARAMETERS = {"cudnn_conv_algo_search": "1"}


def config_text(name: str, sidecar: dict, *, engine: bool, batches: tuple[int, int, int]) -> str:
    """The whole file, ASCII.

    ``engine``: a TensorRT plan, else ONNX. ``batches``: smallest, optimal and largest; the server may ask for every
    batch from 1 to the largest, so the first one must be 1.
    """
    _, optimum, maximum = batches
    label_file = f"label_filename: {quoted(LABELS)}"
    parameters = {
        "preprocessing": json.dumps(sidecar["preprocessing"], allow_nan=False),
        "classes": json.dumps(sidecar["classes"]),
        "sha256": sidecar["sha256"],
    }
    parts = [
        HEADER,
        f"name: {quoted(name)}",
        'platform: "tensorrt_plan"' if engine else 'backend: "onnxruntime"',
        f"max_batch_size: {maximum}",
        f"input [ {{ {_tensor(sidecar['input'])} }} ]",
        f"output [ {{ {_tensor(sidecar['output'])} {label_file} }} ]",
        *_batching(optimum, maximum),
        _cuda_graphs(sidecar["input"], optimum, maximum) if engine else ONNX_SETTINGS,
        *(_parameter(*entry) for entry in ({} if engine else ONNX_PARAMETERS).items()),
        *(_parameter(*entry) for entry in parameters.items()),
    ]
    return "\n".join(parts) + "\n"


def quoted(text: str) -> str:
    """A protobuf text string: UTF-8, with everything but printable ASCII as octal escapes."""
    escapes = {ord('"'): '\\"', ord("\\"): "\\\\"}
    return '"' + "".join(escapes.get(b, chr(b) if 32 <= b < 127 else f"\\{b:03o}") for b in text.encode()) + '"'


def _tensor(description: dict) -> str:
    """Name, type and shape, the latter without the batch, which the server adds."""
    data_type, dims = DATA_TYPES[description["dtype"]], _numbers(description["shape"][1:])
    return f"name: {quoted(description['name'])} data_type: {data_type} dims: {dims}"


def _batching(optimum: int, maximum: int) -> list[str]:
    if maximum == 1:
        return []
    preferred = _numbers(sorted({optimum, maximum} - {1}))
    settings = f"preferred_batch_size: {preferred} max_queue_delay_microseconds: {QUEUE_DELAY_US}"
    return [f"dynamic_batching {{ {settings} }}"]


def _cuda_graphs(images: dict, optimum: int, maximum: int) -> str:
    """A CUDA graph for one request alone and for each size that the batcher prefers; other batches run without."""
    shape = f"input {{ key: {quoted(images['name'])} value {{ dim: {_numbers(images['shape'][1:])} }} }}"
    graphs = [f"    graph_spec {{ batch_size: {batch} {shape} }}" for batch in sorted({1, optimum, maximum})]
    return "\n".join(["optimization {", "  cuda {", "    graphs: true", *graphs, "  }", "}"])


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}"


def _numbers(values: list[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"
