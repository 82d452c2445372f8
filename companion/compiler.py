"""What torch.compile looks up once in each process: its own modules, and which vector instructions the C++
compiler can use. Together some seconds, spared to processes that are forked from one where this was imported:
`launch.warm("companion.compiler")`.

Where there is a GPU nothing is looked up: the compiler's modules ask CUDA for it when they are imported, and
processes that are forked afterwards cannot use it any more.
"""

import os
from unittest import mock

import torch

from companion import devices


def has_gpu() -> bool:
    """Asked of NVML, NVIDIA's library for management, which leaves CUDA alone."""
    with mock.patch.dict(os.environ, PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return torch.cuda.is_available()


if devices.why_not("compile") is None and not has_gpu():
    from torch._inductor import compile_fx, cpu_vec_isa  # noqa: F401

    cpu_vec_isa.valid_vec_isa_list()
