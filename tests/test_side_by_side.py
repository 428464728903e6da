"""`make test` runs every test once, and says so if one fails."""

from collections import Counter
from types import SimpleNamespace

import side_by_side
from side_by_side import TESTS, Result, Unit


def test_every_file_is_run_once():
    runs = Counter(file for unit in side_by_side.units() if not unit.part for file in unit.files)
    parts = Counter(unit.files[0] for unit in side_by_side.units() if unit.part)
    assert set(runs.values()) == {1}
    assert parts == {file: n for file, n in side_by_side.LONG.items() if n > 1}
    assert set(runs) | set(parts) == {path.name for path in TESTS.glob("test_*.py")}


def test_parts_are_all_of_the_tests():
    tests = list("abcdefg")
    parts = [side_by_side.of_part(tests, f"{i}/3") for i in range(3)]
    assert sorted(test for part in parts for test in part) == tests
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_case_is_in_one_part():
    tests = [
        SimpleNamespace(callspec=SimpleNamespace(params={"case": case, "backend": backend}))
        for backend in ("cpu", "emulated")
        for case in "abcde"
    ]
    parts = [side_by_side.of_part(tests, f"{i}/2") for i in range(2)]
    cases = [Counter(test.callspec.params["case"] for test in part) for part in parts]
    assert cases == [dict.fromkeys("ace", 2), dict.fromkeys("bd", 2)]


def test_what_failed_is_named(monkeypatch, capsys):
    outputs = {
        "a": (0, "...\n===== 12 passed, 3 skipped in 1.20s ====="),
        "b": (1, "FAILED x\n1 failed, 2 passed in 0.5s"),
        "c": (5, "no tests ran in 0.1s"),
        "d": (2, "INTERNALERROR"),
    }
    monkeypatch.setattr(side_by_side, "units", lambda: [Unit((name,)) for name in outputs])
    monkeypatch.setattr(side_by_side, "build_what_all_need", lambda: None)
    monkeypatch.setattr(
        side_by_side, "run", lambda unit, _: Result(unit, *outputs[unit.files[0]], seconds=1)
    )
    monkeypatch.setattr("sys.argv", ["side_by_side.py"])
    assert side_by_side.main() == 1
    shown = capsys.readouterr().out
    assert "not passed: b, status 1" in shown
    assert "not passed: d, status 2" in shown
    assert "not passed: c" not in shown
    assert "==== 1 failed, 14 passed, 3 skipped in" in shown
    del outputs["b"], outputs["d"]
    assert side_by_side.main() == 0
