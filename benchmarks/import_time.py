"""How long `import companion` takes in a fresh interpreter, beside an interpreter that imports nothing, and `import torch`."""

import statistics
import subprocess
import sys
import time


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def measure_all(rounds: int = 9) -> list[dict]:
    """Median seconds above those of an empty interpreter, taken in turn."""
    codes = {"nothing": "pass", "companion": "import companion", "torch": "import torch"}
    series = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            series[name].append(seconds(code))
    above = {name: statistics.median(a - b for a, b in zip(series[name], series["nothing"], strict=True)) for name in codes}
    row = {
        "what": "import",
        "companion (s)": round(above["companion"], 4),
        "torch (s)": round(above["torch"], 2),
        "limit (s)": 0.2,
    }
    return [row]
