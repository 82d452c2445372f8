"""What the runner of notebooks costs: beside nbclient alone, and two at once beside one after the other.

One notebook at its defaults, as a user runs it, and with the small parameters of the tests: the longer it
takes, the smaller the share of what its start and its page cost. Several have the small parameters, so that a
round takes minutes.
"""

import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from companion import jobs, measure, runner

ROOT = Path(__file__).parents[1]
ONE = "02_data_parallel"
SEVERAL = ("00_baseline", "02_data_parallel", "08_quantization", "09_pruning")
ROUNDS = 3


def smaller(stem: str) -> jobs.Job:
    """A notebook with its small parameters."""
    settings = tomllib.loads((ROOT / "tests" / "parameters.toml").read_text(encoding="utf-8"))["smaller"]
    return jobs.Job(ROOT / "notebooks" / f"{stem}.ipynb", settings.get(stem, {}), stem)


def at_defaults(stem: str) -> jobs.Job:
    return jobs.Job(ROOT / "notebooks" / f"{stem}.ipynb", {}, stem)


def by_runner(wanted: list[jobs.Job], workers: int = 1) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for outcome in runner.run(wanted, Path(folder), workers, progress=False):
            if outcome.error:
                raise RuntimeError(f"{outcome.job.name}: {outcome.error}")


def by_nbclient(job: jobs.Job) -> None:
    """The same cells with the same parameters, and nothing noted."""
    from nbclient import NotebookClient
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    values = job.parameters | {"results_dir": "."}
    notebook = parameterize_notebook(load_notebook_node(str(job.notebook)), values)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()


def overhead(job: jobs.Job, parameters: str, rounds: int) -> dict:
    """A row: the runner beside nbclient alone."""
    ways = {"nbclient": lambda: by_nbclient(job), "runner": lambda: by_runner([job])}
    times = measure.compare(ways, rounds=rounds, warm_up=1 if parameters == "small parameters" else 0)
    extra = times.part("runner", of="nbclient")
    return {
        "what": f"the runner, {ONE} with {parameters} (s)",
        "plain": f"{times['nbclient']:.1f} (nbclient)",
        "ours": f"{times['runner']:.1f}",
        "limit": "5% more (agreed)",
        "against plain": f"{extra:.2f}x",
        "of the limit": f"{(extra.median - 1) / 0.05:.0%}",
    }


def measure_all(rounds: int = ROUNDS) -> Iterator[dict]:
    yield overhead(smaller(ONE), "small parameters", rounds)
    yield overhead(at_defaults(ONE), "its defaults", rounds)
    several = [smaller(stem) for stem in SEVERAL]
    ways = {"--jobs 1": lambda: by_runner(several), "--jobs 2": lambda: by_runner(several, 2)}
    times = measure.compare(ways, rounds=max(1, rounds - 1), warm_up=0)
    gain = times.speed_up("--jobs 2", over="--jobs 1")
    yield {
        "what": f"{len(several)} notebooks with small parameters, two at once (s)",
        "plain": f"{times['--jobs 1']:.0f} (--jobs 1)",
        "ours": f"{times['--jobs 2']:.0f} (--jobs 2)",
        "limit": "1.5x (agreed)",
        "against plain": f"{gain:.2f}x",
        "of the limit": f"{gain.median / 1.5:.0%}",
    }
