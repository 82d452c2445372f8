"""What torch.compile looks up once in each process: its own modules, and which vector instructions the C++
compiler can use. Together some seconds, spared to processes that are forked from one where this was imported:
`launch.warm("companion.compiler")`.
"""

from torch._inductor import compile_fx, cpu_vec_isa  # noqa: F401

from companion import devices

if devices.why_not("compile") is None:
    cpu_vec_isa.valid_vec_isa_list()
