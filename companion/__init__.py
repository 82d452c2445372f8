"""What the notebooks of this suite share. Importing it is cheap: modules load on first use."""

import importlib

MODULES = (
    "advice",
    "batches",
    "checkpoint",
    "checks",
    "cluster_scripts",
    "clusters",
    "collectives",
    "data",
    "data_parallel",
    "datasets",
    "ddp",
    "devices",
    "diagrams",
    "dispatch",
    "executed",
    "figures",
    "fusing",
    "host",
    "hybrid",
    "hybrid_figures",
    "hybrid_machine",
    "hybrid_plan",
    "hybrid_steps",
    "jobs",
    "kernels",
    "launch",
    "ledger",
    "layouts",
    "links",
    "low_bits",
    "machine",
    "machines",
    "measure",
    "memory",
    "model_parallel",
    "models",
    "modules",
    "multi_machine",
    "network",
    "packing",
    "parity",
    "pictures",
    "pipeline",
    "plots",
    "pruning",
    "pruning_channels",
    "quantization",
    "quantization_compare",
    "quantization_errors",
    "quantization_peers",
    "quantization_pt2e",
    "quantized",
    "randomness",
    "ray_callbacks",
    "ray_results",
    "ray_runner",
    "ray_session",
    "ray_trials",
    "ray_tune",
    "recipe",
    "recoveries",
    "report",
    "runner",
    "schedules",
    "scoreboard",
    "scratch",
    "search_figures",
    "sharded_checkpoint",
    "splitting",
    "stacks",
    "stages",
    "stored",
    "summary",
    "summary_figures",
    "tables",
    "timetables",
    "tpu",
    "traces",
    "tracing",
    "tradeoffs",
    "training",
    "xla_counts",
    "xla_diagnosis",
)


def __getattr__(name: str):
    if name in MODULES:
        return importlib.import_module(f"companion.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("accelerating-pytorch")
    raise AttributeError(f"module 'companion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES, "__version__"])
