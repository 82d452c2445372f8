import ast
import json
import math
import os
import re
import signal
import socket
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from companion import __main__ as cli
from companion import executed as executed_files
from companion import host, jobs, kernels, runner, scoreboard

pytestmark = pytest.mark.once
PARAMETERS = """epochs: int = 3  # passes over the data
learning_rate: float = 0.1  # of the optimizer
dataset: str = "digits"  # what to learn
deep: bool = False  # more layers
results_dir: str = "results"  # where rows go"""


def write(folder, name, *code):
    cells = [
        new_markdown_cell(f"# The question of {name}?"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
    ]
    cells += [new_code_cell(source) for source in code]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "note books"
    folder.mkdir()
    write(folder, "00_works", "print(epochs, type(learning_rate).__name__, dataset)")
    write(folder, "01_fails", "raise RuntimeError('this one fails')")
    write(
        folder,
        "02_records",
        "from companion import scoreboard\nscoreboard.record(results_dir, '02', 'x', {'a': (epochs, 's')});",
    )
    return folder


def wait_for(condition, seconds=30):
    """Waits until the condition holds, and fails if it does not within some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # a container without an init leaves ended orphans as zombies
    return not (state.exists() and ") Z " in state.read_text())


def call(notebooks, *words) -> int:
    return cli.main([words[0], "--notebooks", str(notebooks), *words[1:]])


def test_notebooks_run_in_their_folder_and_this_process_stays_in_its_own(notebooks, tmp_path, monkeypatch):
    moves = []
    write(notebooks, "03_where", "import os; print(os.getcwd())")
    monkeypatch.setattr(os, "chdir", moves.append)
    (tmp_path / "out").mkdir()
    assert runner.execute(runner.Job(notebooks / "03_where.ipynb"), tmp_path / "out").error is None
    executed = nbformat.read(tmp_path / "out" / "03_where.ipynb", 4)
    assert executed.cells[-1].outputs[0].text == f"{tmp_path / 'out'}\n"
    assert set(moves) <= {os.getcwd()}, "another notebook, run at the same time, would be moved too"


def test_a_failing_notebook_stops_no_other_and_the_exit_code_says_so(notebooks, tmp_path, capfd):
    out = tmp_path / "out put"
    assert call(notebooks, "run", "--jobs", "2", "--output", str(out), "-p", "epochs", "7") == 1
    printed = capfd.readouterr().out
    assert "01_fails" in printed
    assert "failed: RuntimeError: this one fails" in printed
    assert "2 passed, 1 failed" in printed
    last = printed.rstrip().splitlines()[-2:]
    assert [line.split(":")[0] for line in last] == ["failed", "2 passed, 1 failed; report"], "not at the end"
    assert last[0] == "failed: 01_fails: RuntimeError: this one fails"
    executed = nbformat.read(out / "00_works.ipynb", 4)
    assert executed.cells[-1].outputs[0].text == "7 float digits\n"
    assert "papermill" not in executed.metadata
    assert [row["metrics"]["a"]["value"] for row in scoreboard.read(out)] == [7]
    page = (out / "index.html").read_text()
    assert "3 notebooks run, 1 failed" in page
    assert "failed: RuntimeError: this one fails" in page
    assert "a 7 s" in page
    for name in ("00_works", "01_fails", "02_records"):
        assert f"<a href='{name}.html'>" in page
        assert (out / f"{name}.html").stat().st_size > 1000


def test_success_is_exit_code_0_and_each_combination_of_a_sweep_runs(notebooks, tmp_path, capfd):
    out = tmp_path / "out"
    assert (
        call(
            notebooks, "run", "00", "--sweep", "epochs=1,2", "--sweep", "dataset=a,b/c", "--output", str(out)
        )
        == 0
    )
    printed = [nbformat.read(path, 4).cells[-1].outputs[0].text for path in sorted(out.glob("*.ipynb"))]
    assert printed == ["1 float a\n", "1 float b/c\n", "2 float a\n", "2 float b/c\n"]


def test_a_dead_kernel_is_a_failure_like_any_other(notebooks, tmp_path, capfd):
    write(notebooks, "03_dies", "print('alive')", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert call(notebooks, "run", "03", "00", "--output", str(tmp_path / "out")) == 1
    printed = capfd.readouterr().out
    assert "1 passed, 1 failed" in printed
    assert "failed: DeadKernelError: Kernel died" in printed
    before = nbformat.read(tmp_path / "out" / "03_dies.ipynb", 4).cells[-2]
    assert before.outputs[0].text == "alive\n", "what was there before is not lost"


def test_a_running_notebook_is_written_now_and_then(notebooks, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(papermill.engines, "write_ipynb", lambda *notebook: written.append(time.monotonic()))
    write(notebooks, "03_many", *["pass"] * 20, "import time; time.sleep(0.6)", *["pass"] * 20)
    job = runner.Job(notebooks / "03_many.ipynb", {}, "many")
    for seconds in (0.5, 60.0):
        written.clear()
        monkeypatch.setattr(runner, "SAVE_SECONDS", seconds)
        assert [outcome.error for outcome in runner.run([job], tmp_path, progress=False)] == [None]
        between = written[1:-1]  # besides those at the start and at the end
        assert bool(between) == (seconds < 0.6), "the cell that sleeps is long enough for one"
        assert all(later - earlier >= seconds for earlier, later in pairwise(between))


BUSY = """
import multiprocessing, time

def work():
    while time.process_time() < 1:
        pass

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
"""


def test_time_and_memory_are_kept_of_all_processes(notebooks, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SAMPLE_SECONDS", 0.05)
    monkeypatch.setattr(kernels, "LOOKS_SHARE", 1)
    write(notebooks, "03_busy", "import time; x = b'1' * (3 * 10**8); time.sleep(0.5); del x", BUSY)
    out = tmp_path / "out"
    (outcome,) = runner.run([runner.Job(notebooks / "03_busy.ipynb", {}, "03_busy")], out, progress=False)
    assert outcome.cpu_seconds > 0.7, "the child counts"
    executed = nbformat.read(out / "03_busy.ipynb", 4)
    assert 3e8 < outcome.memory_bytes < 6e8
    run, (*_, sleeps, busy) = executed.metadata.companion.run, executed.cells
    assert run.cpu_seconds == pytest.approx(outcome.cpu_seconds, abs=0.01)
    assert sleeps.metadata.companion.seconds > 0.5 > sleeps.metadata.companion.cpu_seconds
    assert busy.metadata.companion.cpu_seconds > 0.7
    page = (out / "index.html").read_text()
    assert run.memory_bytes == outcome.memory_bytes
    assert re.search("memory .GiB.</th><th[^>]*>slowest cells</th>", page)
    assert f"[{busy.execution_count}] " in page


def test_a_run_leaves_the_environment_as_it_was(notebooks, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write(notebooks, "03_threads", "import os; print(os.environ['OMP_NUM_THREADS'])")
    list(runner.run([runner.Job(notebooks / "03_threads.ipynb", {}, "one")], tmp_path, 64, progress=False))
    assert nbformat.read(tmp_path / "one.ipynb", 4).cells[-1].outputs[0].text == "1\n"
    assert "OMP_NUM_THREADS" not in os.environ


def test_an_interrupt_keeps_what_was_finished_and_leaves_no_kernel(notebooks, tmp_path, python, root):
    write(
        notebooks,
        "03_sleeps",
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)",
    )
    out = tmp_path / "out"
    words = ["-m", "companion", "run", "--notebooks", str(notebooks), "00", "03", "02", "--output", str(out)]
    with subprocess.Popen([*python, *words], stderr=subprocess.PIPE, text=True, cwd=root) as process:
        wait_for(lambda: (out / "pid").exists() and (out / "pid").read_text())
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted; what was finished is kept" in printed
    assert "1 notebooks run, 0 failed" in (out / "index.html").read_text()
    assert not (out / "02_records.ipynb").exists()
    kernel = int((out / "pid").read_text())
    wait_for(lambda: not alive(kernel))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "epoch", "3"], "00_works has no parameter 'epoch'; did you mean 'epochs'?"),
        (["-p", "epochs", "three"], "00_works: epochs=three is not a whole number, as its default 3 is"),
        (["-p", "epochs", "1.5"], "00_works: epochs=1.5 is not a whole number"),
        (["-p", "deep", "1"], "00_works: deep=1 is not True or False, as its default False is"),
        (["-p", "learning_rate", "True"], "00_works: learning_rate=True is not a number"),
        (["--sweep", "batch_size=1,2"], "00_works has no parameter 'batch_size'"),
        (["--sweep", "epochs"], "--sweep epochs is not of the form name=first,second"),
        (["--sweep", "epochs=1,2", "--sweep", "epochs=3"], "--sweep epochs is given twice"),
        (["--sweep", "epochs=1,2,1"], "--sweep epochs=1,2,1 has '1' twice"),
        (["--sweep", "epochs=1,"], "00_works: epochs= is not a whole number"),
        (["-p", "epochs", "1", "--sweep", "epochs=1,2"], "epochs is fixed by -p and swept by --sweep"),
        (["-p", "epochs", "1", "-p", "epochs", "2"], "-p epochs is given twice"),
        (["00_work"], "there is no notebook '00_work'; did you mean '00_works'?"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(notebooks, tmp_path, capfd, words, message):
    assert call(notebooks, "run", *words, "--output", str(tmp_path / "out")) == 2
    assert f"error: {message}" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_jobs_at_once_is_refused(notebooks, capfd):
    with pytest.raises(SystemExit):
        call(notebooks, "run", "--jobs", "0")
    assert "--jobs 0 must be at least 1" in capfd.readouterr().err


def test_a_folder_without_notebooks_is_refused(tmp_path, capfd):
    assert call(tmp_path, "list") == 2
    assert "there are no notebooks in" in capfd.readouterr().err


def test_values_take_the_types_of_the_defaults(notebooks):
    given = {"epochs": "5", "learning_rate": "1", "dataset": "1", "deep": "True"}
    typed = jobs.check(notebooks / "00_works.ipynb", given)
    assert typed == {"epochs": 5, "learning_rate": 1.0, "dataset": "1", "deep": True}
    assert [type(value) for value in typed.values()] == [int, float, str, bool]


TYPES = """path = "run=1/part"  # where, e.g. a=b
colour: str = "#fff"
size = 2**10  # of a page
rate = -1e-3
nothing = None
sizes = [1, 2]
shape = (1, 2)
extra = {"k": 1}
flag: bool = True
large = 1_000
one = 1; other = 2  # both
items = [
    1,
    2,
]  # in lines
where = Path("x")
share = 5.0
"""


@pytest.fixture
def typed(tmp_path):
    cells = [new_code_cell(TYPES, metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=cells), tmp_path / "00_types.ipynb")
    return tmp_path / "00_types.ipynb"


VALUES = [
    ("path", "a=b#c, d", "a=b#c, d"),
    ("colour", "1", "1"),
    ("size", "64", 64),
    ("size", "2**5", 32),
    ("size", "-7", -7),
    ("rate", "-2e-3", -2e-3),
    ("rate", "3", 3.0),
    ("rate", "inf", math.inf),
    ("nothing", "5", 5),
    ("nothing", "text", "text"),
    ("nothing", "None", None),
    ("sizes", "[-3, None, 'e']", [-3, None, "e"]),
    ("sizes", "(3, 4)", [3, 4]),
    ("sizes", "1,2", [1, 2]),
    ("shape", "(-1, 4)", (-1, 4)),
    ("shape", "[3, 4]", (3, 4)),
    ("extra", "{'a': (1, 2), 'b': None}", {"a": (1, 2), "b": None}),
    ("flag", "false", False),
    ("flag", "TRUE", True),
    ("large", "2_000", 2000),
    ("other", "3", 3),
    ("items", "[3]", [3]),
    ("share", "1/4", 0.25),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_values_of_all_kinds(typed, name, text, value):
    (found,) = jobs.check(typed, {name: text}).values()
    assert found == value
    assert type(found) is type(value)


def test_a_value_that_is_not_a_number_is_one_to_a_notebook(typed):
    assert math.isnan(jobs.check(typed, {"share": "nan"})["share"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("where", "y", r"where cannot be set: its default Path\(\"x\"\) is code"),
        ("size", "2.5", "size=2.5 is not a whole number"),
        ("size", "None", "size=None is not a whole number"),
        ("size", "10**10**10", "is not a whole number"),
        ("size", "1/0", "is not a whole number"),
        ("size", "__import__('os')", "is not a whole number"),
        ("flag", "0", "flag=0 is not True or False"),
        ("flag", "yes", "flag=yes is not True or False"),
        ("sizes", "12", r"sizes=12 is not a list such as \[1, 2\]"),
        ("extra", "[1]", "is not a dictionary such as"),
        ("rate", "fast", "rate=fast is not a number, as its default -1e-3 is"),
        ("rate", "True", "rate=True is not a number"),
    ],
)
def test_values_of_another_type_are_refused_with_what_is_expected(typed, name, text, message):
    with pytest.raises(ValueError, match=message):
        jobs.check(typed, {name: text})


def test_parameters_have_their_whole_defaults_and_comments(typed):
    found = jobs.parameters(typed)
    names = "path colour size rate nothing sizes shape extra flag large one other items where share"
    assert " ".join(found) == names
    assert (found["path"].default, found["path"].help) == ('"run=1/part"', "where, e.g. a=b")
    assert found["size"].value == 1024
    assert found["one"].help == found["other"].help == "both"
    assert found["items"].help == "in lines"
    assert found["flag"].kind == "bool"


@pytest.mark.parametrize("value", ["-0.5", "-1e-3", "-.5e2", " -1e-3"])
def test_negative_values_are_no_options(notebooks, value, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(runner, "run", lambda wanted, *more, **options: seen.extend(wanted) or iter(()))
    given = (
        ["-p", "learning_rate", value],
        ["-p", "dataset", "--all"],
        ["--sweep", f"learning_rate={value},1e-3"],
    )
    for number, words in enumerate(given):
        assert call(notebooks, "run", "00", "--output", str(tmp_path / f"{number}"), *words) == 0
    expected = [{"learning_rate": float(value)}, {"dataset": "--all"}]
    expected += [{"learning_rate": float(value)}, {"learning_rate": 1e-3}]
    assert [job.parameters for job in seen] == expected


def test_p_without_its_value_is_refused(notebooks, capfd):
    for words in (["run", "-p", "epochs"], ["list", "-p", "epochs", "3"]):
        with pytest.raises(SystemExit):
            call(notebooks, *words)
    assert "-p needs a name and a value" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ("a/b,a_b,a b", 3),
        ("A,a", 2),
        ("x" * 300 + ",y", 2),
        ("雪" * 90, 1),
        ("'a,b',c", 2),
        ("e" * 299 + "f," + "e" * 299, 2),
    ],
)
def test_each_combination_has_files_of_its_own(notebooks, values, count):
    _, sweeps = jobs.pairs([], [f"dataset={values}"])
    wanted = jobs.plan([notebooks / "00_works.ipynb"], {}, sweeps)
    names = [job.name.casefold() for job in wanted]
    assert len(set(names)) == len(names) == count
    assert all(len(name.encode()) < 150 for name in names)
    assert len({job.parameters["dataset"] for job in wanted}) == count


def test_lists_can_be_swept(typed):
    _, sweeps = jobs.pairs([], ["sizes=[1,2],[3]", "shape=(1,2),(3,4)"])
    wanted = jobs.plan([typed], {}, sweeps)
    assert [job.parameters["sizes"] for job in wanted] == [[1, 2], [1, 2], [3], [3]]
    assert [job.parameters["shape"] for job in wanted] == [(1, 2), (3, 4)] * 2


def without_kernel(path):
    notebook = json.loads(path.read_text())
    path.write_text(json.dumps(notebook | {"metadata": {}}))


BROKEN = {
    "a merge conflict": lambda path: path.write_text("<<<<<<< HEAD\n" + path.read_text()),
    "an empty file": lambda path: path.write_text(""),
    "no notebook": lambda path: path.write_text("[1, 2]"),
    "no kernel's name": without_kernel,
    "a kernel that is not there": lambda path: path.write_text(path.read_text().replace("python3", "mine")),
    "parameters that are no Python": lambda path: path.write_text(
        path.read_text().replace("epochs: int", "1 +")
    ),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_broken_notebook_stops_no_other(notebooks, tmp_path, capfd, spoil):
    spoil(notebooks / "02_records.ipynb")
    (notebooks / "01_fails.ipynb").unlink()
    out = tmp_path / "out"
    assert call(notebooks, "run", "--output", str(out)) == 1
    printed = capfd.readouterr().out
    assert "1 passed, 1 failed" in printed
    assert re.search(r"02_records .*failed: \w+: .", printed)
    assert "2 notebooks run, 1 failed" in (out / "index.html").read_text()
    call(notebooks, "list")
    assert "00_works: The question of 00_works?" in capfd.readouterr().out


def test_a_kernel_that_does_not_come_up_is_started_once_more(notebooks, tmp_path, monkeypatch):
    import papermill

    execute, failures = papermill.execute_notebook, ["Kernel didn't respond in 60 seconds"]

    def sometimes(*about, **options):
        if failures:
            raise RuntimeError(failures.pop())
        return execute(*about, **options)

    monkeypatch.setattr(papermill, "execute_notebook", sometimes)
    assert runner.execute(runner.Job(notebooks / "00_works.ipynb"), tmp_path).error is None
    failures += ["no memory"]
    error = runner.execute(runner.Job(notebooks / "00_works.ipynb"), tmp_path).error
    assert error == "RuntimeError: no memory"


def test_a_kernel_whose_port_another_process_took_is_started_once_more(notebooks, tmp_path, monkeypatch):
    from jupyter_client.connect import LocalPortCache

    choose, asked = LocalPortCache.find_available_port, []
    with socket.create_server(("127.0.0.1", 0)) as other:

        def first_taken(cache, ip):
            asked.append(ip)
            return other.getsockname()[1] if len(asked) == 1 else choose(cache, ip)

        monkeypatch.setattr(LocalPortCache, "find_available_port", first_taken)
        job = runner.Job(notebooks / "00_works.ipynb")
        assert runner.execute(job, tmp_path).error is None
    assert "Address already in use" in (tmp_path / "00_works.log").read_text()


def test_values_arrive_in_the_notebook_as_they_are(typed, tmp_path):
    notebook = nbformat.read(typed, 4)
    notebook.cells += [new_code_cell("print((shape, sizes, extra, path))")]
    notebook.cells[0].source = notebook.cells[0].source.replace('Path("x")', "None")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, typed)
    text = 'it\'s "q" \\ {x} \n雪'
    given = {"shape": "(-1, (4, None))", "sizes": "[(1, 2), -3]", "extra": "{'a': (1, 2)}", "path": text}
    job = runner.Job(typed, jobs.check(typed, given))
    (tmp_path / "out").mkdir()
    assert runner.execute(job, tmp_path / "out").error is None
    printed = nbformat.read(tmp_path / "out" / "00_types.ipynb", 4).cells[-1].outputs[0].text
    assert ast.literal_eval(printed) == ((-1, (4, None)), [(1, 2), -3], {"a": (1, 2)}, text)


def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(notebooks, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert call(notebooks, "run", "00", "--output", str(tmp_path / "file")) == 2
    assert "error: output" in capfd.readouterr().err


def test_a_disk_that_becomes_full_loses_no_outcome(notebooks, tmp_path, capfd, monkeypatch):
    write_text = Path.write_text

    def full(path, *text, **options):
        if ".html" in path.name:
            raise OSError(28, "No space left on device")
        return write_text(path, *text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert call(notebooks, "run", "00", "02", "--output", str(tmp_path / "out")) == 2
    said = capfd.readouterr()
    assert said.out.count("failed: its results could not be written: OSError: [Errno 28]") == 2
    assert "the report could not be written: No space left on device" in said.err
    assert scoreboard.read(tmp_path / "out")


def test_list_shows_questions_and_parameters(notebooks, capfd):
    assert call(notebooks, "list") == 0
    printed = capfd.readouterr().out
    assert "00_works: The question of 00_works?" in printed
    assert "learning_rate: float    = 0.1                  of the optimizer" in printed


def test_a_notebook_that_took_more_memory_is_named_first(notebooks, tmp_path, capfd, monkeypatch):
    path = notebooks / "00_works.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[0].source += "\n\n**Needs** about 0.1 minutes and 2.5 GiB on a 2-core CPU."
    nbformat.write(notebook, path)
    said = "took 2.5 GiB at its defaults, 2.0 are here: its kernel may be killed"
    for there, expected in ((2 * 2**30, True), (3 * 2**30, False), (0, False)):
        monkeypatch.setattr(host, "usable_memory_bytes", lambda root="/", there=there: there)
        assert (runner.short_of_memory(path) == said) == expected
    assert runner.needs(notebooks / "01_fails.ipynb") == (math.inf, 0.0)
    monkeypatch.setattr(host, "usable_memory_bytes", lambda root="/": 2 * 2**30)
    assert call(notebooks, "doctor") == 0
    assert f"00_works                 full strength; {said}\n" in capfd.readouterr().out
    assert call(notebooks, "run", "00", "--output", str(tmp_path / "out")) == 0
    printed = capfd.readouterr().out
    assert printed.index(f"00_works {said}\n") < printed.index("1 passed")


def test_doctor_says_what_is_missing_and_why(notebooks, capfd, monkeypatch):
    from companion import devices

    path = notebooks / "01_fails.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.metadata["companion"] = {"uses": ["cuda"]}
    nbformat.write(notebook, path)
    monkeypatch.setattr(devices, "why_not", lambda kind: "there is none" if kind == "cuda" else None)
    assert call(notebooks, "doctor") == 0
    printed = capfd.readouterr().out
    assert "00_works                 full strength" in printed
    assert "01_fails                 without cuda: there is none" in printed
    assert "instruction sets" in printed


@pytest.fixture(autouse=True)
def stored_scoreboard(tmp_path, monkeypatch):
    """In place of the one that comes with the package."""
    monkeypatch.setattr(scoreboard, "STORED", tmp_path / "stored" / scoreboard.FILE)
    (tmp_path / "stored").mkdir()
    return tmp_path / "stored"


def test_store_keeps_what_was_recorded(notebooks, stored_scoreboard):
    records = "from companion import scoreboard\nfor n in range({}):\n    "
    records += "scoreboard.record(results_dir, '{}', f'x {{n}}', {{'a': (epochs, 's')}})"
    for name, rows in (("02_records", 2), ("03_records", 1), ("02_records", 1)):
        write(notebooks, name, records.format(rows, name))
        assert call(notebooks, "store", name) == 0
    found = [(row["notebook"], row["technique"]) for row in scoreboard.read(stored_scoreboard)]
    assert found == [("02_records", "x 0"), ("03_records", "x 0")]


def test_store_keeps_outputs_with_the_hash_of_their_source(notebooks, capfd):
    path = notebooks / "00_works.ipynb"
    assert call(notebooks, "store", "00") == 0
    stored = nbformat.read(path, 4)
    assert stored.cells[-1].outputs[0].text == "3 float digits\n"
    assert stored.cells[-1].execution_count == 2
    assert stored.metadata.companion.source_sha256 == executed_files.source_hash(stored)
    assert stored.metadata.companion.environment["cores"] >= 1
    stored.cells[-1].source += "  # changed"
    assert stored.metadata.companion.source_sha256 != executed_files.source_hash(stored)
    assert [p.name for p in notebooks.glob("00*")] == ["00_works.ipynb"]


def test_store_leaves_a_failing_notebook_as_it_was(notebooks, capfd):
    before = (notebooks / "01_fails.ipynb").read_bytes()
    assert call(notebooks, "store", "01") == 1
    assert (notebooks / "01_fails.ipynb").read_bytes() == before
    assert "01_fails: failed: RuntimeError: this one fails" in capfd.readouterr().out


def test_tidy_removes_progress_bars_and_notes_of_tools():
    bar = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"})
    text = new_output("stream", text="kept")
    cell = new_code_cell(
        "x", outputs=[bar, text], metadata={"papermill": {"duration": 1}, "tags": ["proof"], "execution": {}}
    )
    tidy = executed_files.tidy(
        new_notebook(cells=[cell], metadata={"widgets": {}, "papermill": {}, "companion": {}})
    )
    assert tidy.cells[0].outputs == [text]
    assert tidy.cells[0].metadata == {"tags": ["proof"]}
    assert json.loads(json.dumps(tidy.metadata)) == {"companion": {}}
