"""From an ONNX file to a serialised engine, with what the builder says of it: memory and fused layers.

Networks are strongly typed: precision is what the ONNX file says, by its types, casts and Q/DQ pairs. TensorRT-RTX
builds without a GPU, enterprise TensorRT on the GPU that will run the engine.
"""

import re
import time
from dataclasses import dataclass

from rd_deploy.chain import INPUT
from rd_deploy.common import UserError, one_line
from rd_deploy.trt.flavours import Flavour
from rd_deploy.trt.layers import Layer, parse_layers
from rd_deploy.trt.messages import MAX_REASON, Messages

# Of enterprise TensorRT, which compares the most kernels at it; 3 is its default. TensorRT-RTX chooses where it runs.
OPTIMIZATION_LEVEL = 5
MAX_BATCH = 4096
# The first compute capability whose tensor cores multiply a precision (any that TensorRT still has: sm75).
FIRST_TARGET = {"bf16": 80, "fp8": 89}
# TensorRT-RTX's default targets start here: sm75 refuses fp32 matrix products, which all our fp32 networks end in.
FIRST_DEFAULT = 80


@dataclass(frozen=True)
class Profile:
    """Batch sizes that an engine takes, and the one it is best at. Equal ones: planned for that batch alone."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum <= MAX_BATCH:
            raise UserError(
                f"batch sizes {self} must be minimum:optimum:maximum, rising, from 1 to {MAX_BATCH}, such as 1:8:32"
            )

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """``"1:8:32"``, or ``"8"`` for an engine of one batch size."""
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
            raise UserError(f"--batch {text}: give minimum:optimum:maximum, such as 1:8:32, or one batch size")
        numbers = [int(part) for part in parts]
        return cls(*(numbers * 3 if len(numbers) == 1 else numbers))

    @classmethod
    def from_list(cls, values: object) -> "Profile":
        """The inverse of `to_list`; raises `UserError`."""
        if not (isinstance(values, list) and len(values) == 3 and all(type(value) is int for value in values)):
            raise UserError("a profile must be three whole numbers")
        return cls(*values)

    def to_list(self) -> list[int]:
        """Minimum, optimum, maximum, for JSON."""
        return [self.minimum, self.optimum, self.maximum]

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.maximum)
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


@dataclass(frozen=True)
class Built:
    """A serialised engine and the builder's account of it.

    ``activation_bytes``: feature maps and workspaces at the largest batch; ``weight_bytes``: weights as the engine
    keeps them. None, or no layers: this TensorRT does not say. ``seconds``: parsing and building.
    """

    content: bytes
    activation_bytes: int | None
    weight_bytes: int | None
    layers: tuple[Layer, ...]
    seconds: float


def choose_targets(
    flavour: Flavour, wanted: tuple[str, ...] | None, precision: str, gpu: str | None
) -> tuple[str, ...]:
    """The compute capabilities to build for, such as ``("sm89", "sm120")``, rising.

    ``wanted``: the user's, or None for the default: the GPU that is here (``gpu``), else everything that the flavour
    and the precision offer. Raises `UserError` for targets that the flavour has not, or whose GPUs lack the precision.
    """
    offered = _offered(flavour, gpu)
    if wanted is not None and (unknown := [name for name in wanted if name not in offered]):
        raise UserError(f"{flavour.title} has no target {', '.join(unknown)}{_instead(flavour, offered)}")
    if wanted is None and gpu is not None and gpu not in offered:
        raise UserError(f"{flavour.title} has no target {gpu}, the GPU here{_instead(flavour, offered)}")
    first = FIRST_TARGET.get(precision, 0)
    default = (gpu,) if gpu is not None else [name for name in offered if _number(name) >= max(first, FIRST_DEFAULT)]
    chosen = tuple(sorted(set(default if wanted is None else wanted), key=_number))
    if old := [name for name in chosen if _number(name) < first]:
        raise UserError(f"{precision} needs sm{first} or later, not {', '.join(old)}; choose another --precision")
    return chosen


def _offered(flavour: Flavour, gpu: str | None) -> tuple[str, ...]:
    """All targets of a flavour: TensorRT-RTX lists its own, enterprise TensorRT builds for the GPU at hand."""
    names = getattr(getattr(flavour.module, "ComputeCapability", None), "__members__", {})
    listed = tuple(name.lower() for name in names if re.fullmatch(r"SM\d+", name))
    return listed or ((gpu,) if gpu is not None else ())


def _instead(flavour: Flavour, offered: tuple[str, ...]) -> str:
    if flavour.name == "rtx":
        return f"; it has {', '.join(offered)}; enterprise TensorRT builds for others, on their own GPU"
    here = ", ".join(offered) or "none"
    return f": it builds for the GPU that is here ({here}); run this there, or take TensorRT-RTX"


def _number(target: str) -> int:
    return int(target.removeprefix("sm"))


def build(model: bytes, flavour: Flavour, profile: Profile, targets: tuple[str, ...]) -> Built:
    """Build an ONNX file whose one input `INPUT` has a free batch. Raises `UserError` with the builder's reason."""
    start, trt, messages = time.perf_counter(), flavour.module, Messages(flavour.module)
    builder = messages.checked(trt.Builder(messages.logger), "start its builder")
    network = _parse(model, flavour, builder, messages)
    config = _config(flavour, builder, targets)
    _set_profile(network, builder, config, profile, messages)
    plan = messages.checked(builder.build_serialized_network(network, config), "build the network")
    lines = messages.lines
    return Built(
        content=bytes(plan),
        activation_bytes=_bytes(lines, "Total Activation Memory"),
        weight_bytes=_bytes(lines, "Total Weights Memory"),
        layers=parse_layers(lines),
        seconds=time.perf_counter() - start,
    )


def _parse(model: bytes, flavour: Flavour, builder, messages: Messages):
    trt = flavour.module
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from TensorRT 11 on
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, messages.logger)
    # A file of no bytes parses without an error: the outputs tell.
    if not parser.parse(model) or network.num_outputs != 1:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reason = "; ".join(f"{error.node_operator()}: {error.desc()}" for error in errors) or "it has no output"
        raise UserError(f"{flavour.title} cannot parse the network: {one_line(reason)[:MAX_REASON]}")
    return network


def _config(flavour: Flavour, builder, targets: tuple[str, ...]):
    trt, config = flavour.module, builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the builder does not list its layers
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 would be rounded to 10 bits on tensor cores
    if flavour.name == "rtx" and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # a run that allocates cannot become a CUDA graph
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    else:
        config.builder_optimization_level = OPTIMIZATION_LEVEL
    return config


def _set_profile(network, builder, config, profile: Profile, messages: Messages) -> None:
    """A static batch is fixed in the network too: planned for one size, it takes no more memory than a range."""
    images = network.get_input(0)
    shape = tuple(images.shape)[1:]
    if profile.minimum == profile.maximum:
        images.shape = (profile.maximum, *shape)
        return
    ranges = builder.create_optimization_profile()
    ranges.set_shape(INPUT, *((batch, *shape) for batch in (profile.minimum, profile.optimum, profile.maximum)))
    if config.add_optimization_profile(ranges) < 0:
        raise UserError(f"TensorRT refuses the batch sizes {profile}: {messages.reason()}")


def _bytes(lines: list[str], what: str) -> int | None:
    """The last figure of a kind in the builder's messages."""
    found = [match for line in lines if (match := re.search(rf"{what}: (\d+) bytes", line))]
    return int(found[-1][1]) if found else None
