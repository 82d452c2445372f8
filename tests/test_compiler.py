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
