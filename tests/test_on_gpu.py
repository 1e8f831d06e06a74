"""One run of all that wants a GPU keeps to its time, and what it had when cut off."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import on_gpu

    return on_gpu


def _part(on_gpu, folder, name, code, seconds=30):
    """Returns a part whose dry run is a script of `code`, given `--output FILE`."""
    script = folder / f"{name}.py"
    script.write_text(f"import json, pathlib, sys, time\n{code}\n")
    return on_gpu.Part(f"Part {name}", (str(script),), (), seconds)


WRITE = """
rows = [{"variant": "a", "seconds": 0.25, "shape": [2, 3], "state_bytes": 1234}]
machine = {"device": "stub", "versions": {"x": "1"}, "date": "today"}
result = json.dumps({"machine": machine, "rows": rows})
pathlib.Path(sys.argv[2]).write_text(result)
"""


def test_a_part_that_hangs_is_ended_and_the_others_keep_their_results(on_gpu, tmp_path):
    hangs, fails = "time.sleep(60)", "sys.exit('no such device')"
    chosen = {
        "first": _part(on_gpu, tmp_path, "first", WRITE),
        "hangs": _part(on_gpu, tmp_path, "hangs", WRITE + hangs, seconds=2),
        "fails": _part(on_gpu, tmp_path, "fails", fails),
    }
    ended = on_gpu.run_all(chosen, tmp_path / "out", budget=60, dry=True)
    assert [x["ended"].split()[0] for x in ended] == ["done", "ended", "failed"]
    table = (tmp_path / "out/table.md").read_text()
    assert "| a | 0.25 | 2x3 | 1,234 |" in table
    assert table.count("stub, x 1, today") == 2  # what was written before the end stays
    assert "no such device" in table
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["parts"] == ended


def test_no_part_is_begun_when_the_time_is_over(on_gpu, tmp_path):
    chosen = {"late": _part(on_gpu, tmp_path, "late", WRITE)}
    [ended] = on_gpu.run_all(chosen, tmp_path / "out", budget=1, dry=True)
    assert ended["ended"] == "not begun: no time was left"
    assert not (tmp_path / "out/late.json").exists()


def test_every_part_names_a_script_that_takes_its_arguments(on_gpu):
    for name, part in on_gpu.parts(["PEER"]).items():
        script, *words = part.command
        if script == "-m":
            continue
        assert Path(script).exists(), name
        source = Path(script).read_text()
        flags = {x for x in [*words, *part.tiny] if x.startswith("--")} | {"--output"}
        assert all(f'"{flag}"' in source for flag in flags), name


@pytest.mark.slow
def test_a_dry_run_of_every_part_is_done(on_gpu, tmp_path, monkeypatch):
    words = ["on_gpu.py", "--dry-run", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        on_gpu.main()
    assert ended.value.code == 0
