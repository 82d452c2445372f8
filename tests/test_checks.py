"""Bad parameters are refused with their name, value and rule; good ones pass."""

import os

import pytest

from companion import checks


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: checks.whole("epochs", 0), r"epochs=0 must be .*1 or more"),
        (lambda: checks.whole("epochs", 2.0), r"epochs=2\.0 must be a whole number"),
        (lambda: checks.whole("epochs", True), r"epochs=True must be a whole number"),
        (lambda: checks.whole("bits", 9, 2, 8), r"bits=9 must be .*2 or more, 8 or less"),
        (lambda: checks.number("learning_rate", float("nan"), above=0), r"learning_rate=nan .*than 0"),
        (lambda: checks.number("learning_rate", 0.0, above=0), r"learning_rate=0\.0 .*greater than 0"),
        (lambda: checks.number("budget", 101, least=0, most=100), r"budget=101 .*100 or less"),
        (lambda: checks.choice("dataset", "mnist", ("digits", "cifar10")), r"'mnist'.*'digits', 'cifar10'"),
        (lambda: checks.whole_numbers("sizes", "8,x"), r"sizes='8,x' must be whole numbers"),
        (lambda: checks.whole_numbers("sizes", ""), r"sizes='' must be whole numbers"),
        (lambda: checks.whole_numbers("bits", "4,1", least=2), r"bits=1 must be .*2 or more"),
    ],
)
def test_what_breaks_a_rule_is_refused(check, said):
    with pytest.raises(ValueError, match=said):
        check()


def test_what_follows_the_rules_passes(tmp_path):
    checks.whole("epochs", 1)
    checks.number("learning_rate", 1e-3, above=0)
    checks.choice("dataset", "digits", ("digits", "cifar10"))
    assert checks.whole_numbers("sizes", "8, 64,512") == [8, 64, 512]
    assert checks.folder("results_dir", tmp_path / "a" / "b").is_dir()


def test_a_folder_that_cannot_be_had_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"results_dir=.*cannot be made"):
        checks.folder("results_dir", tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"results_dir=.*cannot be made"):
        checks.folder("results_dir", tmp_path / "file")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="cannot be written to"):
        checks.folder("results_dir", tmp_path)
