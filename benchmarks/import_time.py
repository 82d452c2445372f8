"""How long `import companion` takes in a fresh interpreter, beside an interpreter that imports nothing, and
`import torch`.
"""

import statistics
import subprocess
import sys
import time

LIMIT_SECONDS = 0.2


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
    above = {
        name: max(0.0, statistics.median(a - b for a, b in zip(series[name], series["nothing"], strict=True)))
        for name in codes
    }
    return [
        {
            "what": "`import companion` (s)",
            "plain": f"{above['torch']:.2f} (`import torch`)",
            "ours": f"{above['companion']:.3f}",
            "limit": f"{LIMIT_SECONDS} (agreed)",
            "against plain": f"{above['companion'] / above['torch']:.3f}x",
            "of the limit": f"{above['companion'] / LIMIT_SECONDS:.1%}",
        }
    ]
