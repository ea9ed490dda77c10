"""Our compiled engine (`rd_deploy.native`): what only a chain without shortcuts allows, on any CPU."""

import numpy as np
import onnx

from rd_deploy import native
from rd_deploy.chain_from_onnx import chain_from_onnx
from rd_deploy.common import UserError
from rd_deploy.engines.base import Engine, Figure, Session, Unsupported
from rd_deploy.export.native import to_rdp
from rd_deploy.native.library import library


class NativeSession(Session):
    """A network planned for this CPU's best instruction set, or for RD_ISA of the environment."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        try:
            network = native.Network.from_bytes(to_rdp(chain_from_onnx(model), precision))
            self.plan = network.plan(batch, threads)
            self._small = network.plan(batch, threads, flags=native.Flag.SMALL).info
        except UserError as reason:  # the arguments are checked: it is the network or the CPU
            raise Unsupported(str(reason)) from reason
        self._context = self.plan.context()

    @property
    def variant(self) -> str:
        return self.plan.info.isa

    def _run(self, images: np.ndarray) -> np.ndarray:
        return self._context.run(images)

    def profile(self, images: np.ndarray) -> np.ndarray:
        """Seconds of each step of the plan in one run."""
        return self._context.profile(images)[1]

    def _feature_maps(self) -> tuple[Figure, ...]:
        info = self.plan.info
        weights = (
            f"{info.weight_bytes:,} bytes of weights in the file, {info.packed_bytes:,} transformed or repacked besides"
        )
        maps = f"most bytes of feature maps at once, by the plan of its one arena; {weights}"
        arena = f"all memory that a run writes, but for the logits: with the threads' scratch; {weights}"
        small = "the arena of a plan for less memory instead of less time (RD_FLAG_SMALL), which is not the one timed"
        return (
            Figure("native maps", info.feature_map_bytes, maps),
            Figure("native arena", info.arena_bytes, arena),
            Figure("native small arena", self._small.arena_bytes, small),
        )


class Native(Engine):
    """The compiled engine of this package."""

    name = "native"
    package = "rd_deploy.native"
    extra = None

    def missing(self) -> str | None:
        try:
            library()
        except UserError as reason:
            return str(reason)
        return None

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return NativeSession(self, model, precision, threads, batch)
