"""The chain on an NVIDIA GPU: which kernels run it (`plan`), where its maps lie (`arena`), how long it should take
(`model`), which of the kernels really is fastest (`tune`), and running it (`session`). Only the last two need a GPU.
"""
