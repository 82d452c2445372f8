"""python -m benchmarks: prints the table (Markdown) and writes it with the environment to results/benchmarks.json."""

import json
from pathlib import Path

from benchmarks import ddp_speed_up, import_time, launch, training_loop
from companion import devices, measure


def main() -> None:
    devices.set_threads()
    print(devices.describe(), flush=True)
    rows = []
    for benchmark in (import_time, training_loop, launch, ddp_speed_up):
        for row in benchmark.measure_all():
            if not rows:
                print(f"\n| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(row.values())} |", flush=True)
            rows.append(row)
    path = Path("results", "benchmarks.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": measure.environment(), "rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
