"""python -m benchmarks [NAME ...]: prints the table (Markdown), and writes it to results/benchmarks.json."""

import argparse
import importlib
import json
from pathlib import Path

from companion import devices, machine

NAMES = (
    "import_time",
    "training_loop",
    "launch",
    "ddp_speed_up",
    "data_parallel",
    "model_parallel",
    "hybrid",
    "multi_machine",
    "tpu",
    "ray_tune",
    "quantization",
    "pruning",
    "fastest",
    "runner",
    "preflight",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument(
        "names", nargs="*", choices=[*NAMES, []], help="all, if none is named", metavar="NAME"
    )
    names = parser.parse_args(arguments).names or NAMES
    devices.set_threads()
    print(machine.describe(), flush=True)
    rows = []
    for name in names:
        for row in importlib.import_module(f"benchmarks.{name}").measure_all():
            if not rows:
                print(f"\n| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(row.values())} |", flush=True)
            rows.append(row)
    path = Path("results", "benchmarks.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": machine.environment(), "rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
