"""Batches: described in a file, limited in time, gone on with after a kill, run by Ray; what they leave."""

import base64
import csv
import json
import random

import nbformat
import pytest
import runner_kills
from justhtml import JustHTML
from nbformat.v4 import new_code_cell, new_notebook
from test_runner import call, write

from companion import batches, jobs, ledger, report, runner, scoreboard

pytestmark = pytest.mark.once


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write(folder, "00_works", "print(epochs, dataset)")
    write(
        folder,
        "03_records",
        "from companion import scoreboard\nscoreboard.record(results_dir, '03', 'x', {'a': (epochs, 's')});",
    )
    return folder


def described(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_file_describes_runs(notebooks, tmp_path):
    text = """
- notebooks: [03, "00_works"]
  parameters: {dataset: cifar10, learning_rate: 1.0e-3}
  sweep: {epochs: [1, 2]}
- notebooks: 03
"""
    wanted = batches.read(described(tmp_path, text), notebooks)
    assert [job.name for job in wanted] == [
        "03_records-epochs=1",
        "03_records-epochs=2",
        "00_works-epochs=1",
        "00_works-epochs=2",
        "03_records",
    ]
    assert wanted[1].parameters == {"dataset": "cifar10", "learning_rate": 1e-3, "epochs": 2}
    assert wanted[-1].parameters == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no YAML"),
        ("{}", "must be a list of entries"),
        ("- parameters: {epochs: 1}", "entry 1: .* has no 'notebooks'"),
        ("- notebooks: 03\n- notebooks: 07", "entry 2: there is no notebook '07'"),
        (
            "- {notebooks: 03, parameter: {epochs: 1}}",
            "parameter is unknown; use notebooks, parameters, sweep",
        ),
        ("- {notebooks: 03, parameters: {epoch: 1}}", "no parameter 'epoch'; did you mean 'epochs'"),
        ("- {notebooks: 03, parameters: {epochs: many}}", "epochs=many is not a whole number"),
        ("- {notebooks: 03, sweep: {epochs: 3}}", "epochs in sweep must be a list of values, not 3"),
        ("- {notebooks: 03, sweep: {epochs: [1, 1]}}", "epochs in sweep has a value twice"),
        ("- {notebooks: 03, parameters: {epochs: 1}, sweep: {epochs: [2]}}", "epochs is fixed and swept"),
        ("- {notebooks: 03, parameters: 7}", "parameters must be names with values, not 7"),
    ],
)
def test_what_describes_no_run_is_refused(notebooks, tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        batches.read(described(tmp_path, text), notebooks)


def test_a_run_from_a_file(notebooks, tmp_path, capfd):
    path = described(tmp_path, "- {notebooks: 03, sweep: {epochs: [4, 5]}}")
    assert call(notebooks, "run", "--file", str(path), "--output", str(tmp_path / "out"), "--jobs", "2") == 0
    assert {row["metrics"]["a"]["value"] for row in scoreboard.read(tmp_path / "out")} == {4, 5}
    assert call(notebooks, "run", "03", "--file", str(path)) == 2
    assert "give no others beside it" in capfd.readouterr().err


def test_a_notebook_that_hangs_is_a_failure_with_its_cell(notebooks, tmp_path, capfd):
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '86397'])"
    write(notebooks, "01_hangs", child, "import time\ntime.sleep(1000)")
    out = tmp_path / "out"
    words = ("run", "00", "01", "--time-limit", "8", "--output", str(out), "--jobs", "2")
    assert call(notebooks, *words) == 1
    assert "failed: TimeoutError: the notebook took longer than 8 s" in capfd.readouterr().out
    (failed,) = (outcome for outcome in ledger.read(out) if outcome.error)
    assert failed.cell == 5, "a heading, parameters, injected parameters, the child, and this one"
    assert "failed in cell 5: TimeoutError" in (out / ledger.REPORT).read_text()


def test_a_kernel_that_is_killed_says_by_what_and_keeps_its_log(notebooks, tmp_path):
    dies = "import os, signal\nos.write(2, b'native code says this')\nos.kill(os.getpid(), signal.SIGKILL)"
    write(notebooks, "01_dies", dies)
    (outcome,) = runner.run(
        jobs.plan([notebooks / "01_dies.ipynb"], {}, {}), tmp_path / "out", progress=False
    )
    assert "SIGKILL, as the system does where memory is short" in outcome.error
    assert outcome.cell == 4, "after a heading, parameters, and injected parameters"
    page = (tmp_path / "out" / ledger.REPORT).read_text()
    assert "failed in cell 4: DeadKernelError" in page


def test_a_run_goes_on_with_what_has_not_passed(notebooks, tmp_path, capfd):
    write(notebooks, "01_fails", "raise RuntimeError('not yet')")
    out = tmp_path / "out"
    assert call(notebooks, "run", "--sweep", "epochs=1,2", "--output", str(out)) == 1
    before = {outcome.job.name: outcome.seconds for outcome in ledger.read(out)}
    write(notebooks, "01_fails", "print('now', epochs)")
    capfd.readouterr()
    assert call(notebooks, "run", "--resume", str(out)) == 0
    printed = capfd.readouterr().out
    assert "4 of 6 have passed already" in printed
    assert "6 passed, 0 failed" in printed
    after = {outcome.job.name: outcome.seconds for outcome in ledger.read(out)}
    assert all(after[name] == before[name] for name in before if "fails" not in name)
    assert nbformat.read(out / "01_fails-epochs=2.ipynb", 4).cells[-1].outputs[0].text == "now 2\n"
    assert "6 notebooks run, 0 failed" in (out / ledger.REPORT).read_text()


def test_a_notebook_that_has_changed_runs_again(notebooks, tmp_path, capfd):
    out = tmp_path / "out"
    assert call(notebooks, "run", "00", "--output", str(out)) == 0
    assert call(notebooks, "run", "--resume", str(out)) == 0
    assert "1 of 1 have passed already" in capfd.readouterr().out
    write(notebooks, "00_works", "print('another')")
    assert call(notebooks, "run", "--resume", str(out)) == 0
    assert "have passed already" not in capfd.readouterr().out
    assert nbformat.read(out / "00_works.ipynb", 4).cells[-1].outputs[0].text == "another\n"


def test_going_on_needs_a_run_and_nothing_else(notebooks, tmp_path, capfd):
    assert call(notebooks, "run", "--resume", str(tmp_path)) == 2
    assert "no run has begun in" in capfd.readouterr().err
    assert call(notebooks, "run", "00", "--resume", str(tmp_path)) == 2
    assert "give it no notebooks" in capfd.readouterr().err


def test_values_of_all_kinds_are_kept_for_going_on(tmp_path):
    cells = [
        new_code_cell(
            "a: tuple = (1, 2)\nb: float = 1.0\nc: dict = {}\nd: str = 'x'\ne: bool = True",
            metadata={"tags": ["parameters"]},
        )
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "00_kinds.ipynb")
    given = {"a": "(3, 4)", "b": "inf", "c": "{'k': [1]}", "d": "it's, 'quoted'", "e": "False"}
    wanted = jobs.plan([tmp_path / "00_kinds.ipynb"], given, {})
    ledger.begin(tmp_path, wanted)
    assert ledger.planned(tmp_path) == wanted


def test_a_line_that_was_cut_off_does_not_count(tmp_path):
    job = jobs.Job(tmp_path / "00_x.ipynb", {"a": 1}, "00_x")
    ledger.add(tmp_path, ledger.Outcome(job, None, 1.0, 2.0, None, "abc"))
    with (tmp_path / ledger.DONE).open("a") as file:
        file.write('{"name": "01_y", "notebook": "0')
    (outcome,) = ledger.read(tmp_path)
    assert (outcome.job.name, outcome.error, outcome.of) == ("00_x", None, "abc")
    assert ledger.left(tmp_path, [job], {job.notebook: "abc"}) == []
    assert ledger.left(tmp_path, [job], {job.notebook: "changed"}) == [job]


def test_the_table_has_a_line_for_each_number_and_the_values_that_differ(notebooks, tmp_path):
    out = tmp_path / "out"
    assert call(notebooks, "run", "--sweep", "epochs=1,2", "-p", "dataset", "d", "--output", str(out)) == 0
    with (out / report.TABLE).open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["job"], line["epochs"], line["metric"], line["value"]) for line in lines] == [
        ("00_works-epochs=1", "1", "", ""),
        ("00_works-epochs=2", "2", "", ""),
        ("03_records-epochs=1", "1", "a", "1.0"),
        ("03_records-epochs=2", "2", "a", "2.0"),
    ]
    assert "dataset" not in lines[0], "it is the same in all"
    assert {line["outcome"] for line in lines} == {"passed"}


def test_the_page_shows_figures_and_sorts(notebooks, tmp_path):
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    shows = f"display(Image(base64.b64decode('{dot}')))"
    write(notebooks, "01_draws", f"from IPython.display import Image, display\nimport base64\n{shows}")
    out = tmp_path / "out"
    assert call(notebooks, "run", "01", "--output", str(out)) == 0
    page = (out / ledger.REPORT).read_text()
    assert "<img src='figures/01_draws-1.png' loading='lazy' alt='figure 1 of 01_draws'>" in page
    assert (out / "figures" / "01_draws-1.png").read_bytes() == base64.b64decode(dot)
    assert "head.onclick" in page
    assert not JustHTML(page, collect_errors=True, sanitize=False).errors, "what a browser would have to mend"


def test_what_reads_the_others_records_runs_after_them(notebooks, tmp_path):
    counts = "from companion import scoreboard\nprint(len(scoreboard.read(results_dir)))"
    write(notebooks, "01_reads", counts)
    path = notebooks / "01_reads.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.metadata["companion"] = {"last": True}
    nbformat.write(notebook, path)
    assert call(notebooks, "run", "--output", str(tmp_path / "out"), "--jobs", "2") == 0
    assert nbformat.read(tmp_path / "out" / "01_reads.ipynb", 4).cells[-1].outputs[0].text == "1\n"


def test_where_several_run_at_once_the_longest_begin_first(tmp_path):
    told = {"00_short": "0.5", "01_long": "3.4", "02_unknown": None, "03_middle": "1", "04_last": "9"}
    for name, minutes in told.items():
        first = f"**Needs** about {minutes} minutes and 1 GiB on a 2-core CPU" if minutes else "# A question?"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(first)])
        notebook.metadata["companion"] = {"last": name == "04_last"}
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    wanted = [runner.Job(tmp_path / f"{name}.ipynb") for name in [*told, "05_not_there"]]
    early, late = runner.waves(wanted, longest_first=True)
    assert [job.notebook.stem[3:] for job in early] == ["unknown", "not_there", "long", "middle", "short"]
    assert [job.notebook.stem for job in late] == ["04_last"]
    assert runner.waves(wanted, longest_first=False)[0] == [wanted[i] for i in (0, 1, 2, 3, 5)]


def test_runs_are_tasks_of_ray(notebooks, tmp_path, capfd):
    pytest.importorskip("ray", reason="needs the extra tune")
    write(notebooks, "01_fails", "raise RuntimeError('this one fails')")
    out = tmp_path / "out"
    assert call(notebooks, "run", "--ray", "local", "--output", str(out), "-p", "epochs", "7") == 1
    assert "2 passed, 1 failed" in capfd.readouterr().out
    assert [row["metrics"]["a"]["value"] for row in scoreboard.read(out)] == [7]
    assert nbformat.read(out / "00_works.ipynb", 4).cells[-1].outputs[0].text == "7 digits\n"
    (failed,) = (outcome for outcome in ledger.read(out) if outcome.error)
    assert failed.error == "RuntimeError: this one fails"
    assert json.loads((out / ledger.PLAN).read_text())[0]["parameters"] == {"epochs": "7"}


def test_a_runner_that_is_killed_loses_nothing(tmp_path):
    assert runner_kills.killed_and_resumed(tmp_path, 2, random.Random(1)) == []
