import subprocess
import sys

import pytest

from companion import devices


def test_what_the_compiler_looks_up_is_known_after_the_import_and_no_thread_or_process_was_left():
    if reason := devices.why_not("compile"):
        pytest.skip(reason)
    code = """
import threading
import psutil
from companion import compiler
from torch._inductor import cpu_vec_isa
print(cpu_vec_isa.valid_vec_isa_list.cache_info().currsize, threading.active_count())
print(len(psutil.Process().children()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1", "0"], done.stdout + done.stderr


def test_where_there_is_a_gpu_nothing_asks_cuda_before_processes_are_forked():
    code = """
import os
import sys
import torch
asked = []
def count():
    asked.append("CUDA")
    return 1
torch._C._cuda_getDeviceCount = count
torch.cuda._raw_device_count_nvml = torch.cuda._device_count_nvml = lambda: 1
torch.cuda._is_compiled = lambda: True
from companion import compiler
print(compiler.has_gpu(), asked, "torch._inductor.compile_fx" in sys.modules)
print("PYTORCH_NVML_BASED_CUDA_CHECK" in os.environ)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "[]", "False", "False"], done.stdout + done.stderr
