"""Triton's kernels run in its interpreter here, on the CPU: what has to be set before triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
