"""GPU kernels of the fused chain, in Triton: one file per kernel, beside its torch reference and its cost.

Maps are NHWC (PyTorch's channels-last), weights and maps in fp16 or bf16, sums and biases in fp32. A kernel is
described by a frozen dataclass of its shapes (`rd_deploy.triton_kernels.launch.Kernel` says what each offers).
Importing this needs triton, and nothing in it needs a GPU: with TRITON_INTERPRET=1 the kernels run on the CPU, and
`rd_deploy.triton_kernels.compile` compiles them ahead of time for any NVIDIA GPU.
"""
