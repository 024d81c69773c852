"""``symmem config show`` and ``symmem config check``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from symmem.config import SETTINGS
from symmem.config.settings import GROUP_NAMES
from symmem.tools.commands import config

BAD_OPTION = "multicast(of)"
GOOD_FILE = "version: 1\ngroups:\n  - match: tp*\n    arena_size: 1GiB\n"
VARIABLES = (
    "SYMMEM_ENABLE",
    "NVFUSER_ENABLE",
    "SYMMEM_CONFIG",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "NVSHMEM_DISABLE_NVLS",
    "NCCL_NVLS_ENABLE",
)
Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(GOOD_FILE)
    return file


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    config.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["config", *words])
    status = args.run(args)
    assert isinstance(status, int)
    return status


def test_show_prints_every_value_its_unit_and_where_it_came_from(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("SYMMEM_CONFIG", str(file))
    monkeypatch.setenv("SYMMEM_ENABLE", "symmetric_memory_backend(native,host)")
    assert run("show", "--group", "tp0") == 0
    context, blank, header, *rows, blank_below, names = capsys.readouterr().out.splitlines()
    assert (blank_below, names) == ("", GROUP_NAMES)
    assert context.endswith(f"group: tp0, file: {file}")
    assert blank == ""
    assert header.split() == ["SETTING", "VALUE", "UNIT", "FROM"]
    assert [row.split()[0] for row in rows] == list(SETTINGS)
    assert rows[0].split() == ["backend", "native,", "host", "-", "SYMMEM_ENABLE,", "character", "1"]
    assert rows[4].split() == ["arena_size", "1GiB", "bytes", f"{file}:4:5", "(groups[0])"]
    assert rows[5].split() == ["arena_growth", "2", "factor", "default"]


def test_show_prints_json(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("SYMMEM_CONFIG", str(file))
    assert run("show", "--json", "--group", "tp0") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["file"] == str(file)
    assert shown["group"] == "tp0"
    assert list(shown["settings"]) == list(SETTINGS)
    assert shown["settings"]["backend"] == {"value": ["auto"], "unit": None, "origin": "default"}
    assert shown["settings"]["arena_size"] == {
        "value": 2**30,
        "unit": "bytes",
        "origin": f"{file}:4:5 (groups[0])",
    }


def test_show_prints_the_settings_of_another_host(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("SYMMEM_CONFIG", str(file))
    file.write_text(
        "version: 1\nhosts:\n  - {match: dgx-*, gpu: '*H200*', arena_size: 2GiB}\n  - {match: login, backend: host}\n"
    )

    def shown(*words: str) -> tuple[str | None, str | None, int, list[str]]:
        assert run("show", "--json", *words) == 0
        found = json.loads(capsys.readouterr().out)
        values = found["settings"]
        return found["host"], found["gpu"], values["arena_size"]["value"], values["backend"]["value"]

    assert shown("--host", "dgx-3", "--gpu", "NVIDIA H200") == ("dgx-3", "NVIDIA H200", 2**31, ["auto"])
    assert shown("--host", "dgx-3", "--gpu", "") == ("dgx-3", None, 2**26, ["auto"])
    assert shown("--host", "login") == ("login", None, 2**26, ["host"])
    assert run("show", "--host", "dgx-3") == 2
    assert "hosts[0] applies to the host 'dgx-3' if its GPU model matches '*H200*'" in capsys.readouterr().err


def test_show_reports_an_error_once(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("SYMMEM_ENABLE", BAD_OPTION)
    assert run("show") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: SYMMEM_ENABLE, character 11: multicast: unknown value 'of'\n")
    assert err.count("SYMMEM_ENABLE") == 1


def test_check_with_nothing_set(capsys: Output) -> None:
    assert run("check") == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok  SYMMEM_ENABLE: nothing set",
        "ok  NVFUSER_ENABLE: nothing set",
        "ok  SYMMEM_CONFIG: nothing set",
    ]


def test_check_tells_what_it_found(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(1024), multicast(off)")
    monkeypatch.setenv("NVFUSER_ENABLE", "x,symmetric_memory_backend(host)")
    monkeypatch.setenv("SYMMEM_CONFIG", str(file))
    assert run("check") == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok  SYMMEM_ENABLE: arena_size = 1KiB, multicast = off",
        "ok  NVFUSER_ENABLE: backend = host",
        f"ok  {file}: entries: groups[0]. {GROUP_NAMES}",
    ]


def test_check_reports_the_errors_of_all_sources(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    file.write_text("version: 1\ndefaults:\n  arena_sise: 1\n")
    monkeypatch.setenv("SYMMEM_ENABLE", BAD_OPTION)
    monkeypatch.setenv("NVFUSER_ENABLE", "symmetric_memory_backend(nativ)")
    assert run("check", str(file)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[1] for line in err.splitlines() if line.startswith("error: ")] == [
        "SYMMEM_ENABLE, character 11",
        "NVFUSER_ENABLE, character 26",
        f"{file}:3:3",
    ]


def test_the_file_given_is_checked_instead_of_the_one_in_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("SYMMEM_CONFIG", "missing.yaml")
    assert run("check", str(file)) == 0
    assert run("check") == 2
    monkeypatch.setenv("SYMMEM_CONFIG", str(file))
    # An unset shell variable as FILE must not pass for a file that was checked.
    assert run("check", "") == 2
    assert "cannot read the cluster file ''" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "status"), [(["show"], 0), (["check"], 0), (["check", "missing.yaml"], 2)])
def test_torch_is_never_imported_and_there_is_no_traceback(words: list[str], status: int) -> None:
    code = (
        "import argparse, sys; from symmem.tools.commands import config; parser = argparse.ArgumentParser();"
        "config.add_parser(parser.add_subparsers()); args = parser.parse_args();"
        "status = args.run(args); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, "config", *words], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
