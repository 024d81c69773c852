"""The ``symmem`` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from patience import TASK

from symmem.backends import available_names, get_backend
from symmem.backends.base import Capability
from symmem.config import BACKENDS
from symmem.errors import BackendUnavailableError
from symmem.tools import cli
from symmem.tools.commands import doctor
from symmem.tools.outcomes import Outcome, RanksFailedError
from symmem.tools.table import render
from symmem.version import VERSION

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SYMMEM_ENABLE", "NVFUSER_ENABLE", "SYMMEM_CONFIG"):
        monkeypatch.delenv(variable, raising=False)


def test_doctor_tells_of_every_backend_whether_why_not_and_what_to_do(capsys: Output) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["machine"]["symmem"] == VERSION
    findings = {finding["backend"]: finding for finding in told["backends"]}
    assert tuple(findings) == available_names()
    assert set(findings) >= set(BACKENDS)
    for finding in findings.values():
        if finding["available"]:
            assert (finding["why_not"], finding["remedy"]) == ("", "")
        else:
            assert len(finding["why_not"]) > 10, finding
            assert len(finding["remedy"]) > 10, finding
    host = findings["host"]
    assert (host["available"], host["device"]) == (True, "cpu")
    assert Capability["CONTIGUOUS_VIEW"] in get_backend("host").capabilities
    assert "contiguous_view" in host["capabilities"]
    assert "multicast" not in host["capabilities"]


def test_doctor_prints_the_same_for_people(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = {
        "one": doctor.Finding("one", True, "cpu", ("signals", "one_sided")),
        "two": doctor.Finding("two", False, "cuda", (), "no driver", "install\none"),
    }
    monkeypatch.setattr(doctor, "available_names", lambda: tuple(findings))
    monkeypatch.setattr(doctor, "examine", findings.__getitem__)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "one      works  cpu     signals, one_sided\n" in out
    assert "two      no     cuda\n" in out
    assert out.endswith("\ntwo: no driver\n  -> install\n  one\n")
    findings["one"] = doctor.Finding("one", False, "cpu", (), "no memory", "buy some")
    assert cli.main(["doctor"]) == 1  # nothing works


def test_doctor_shows_what_the_probe_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise BackendUnavailableError("no memory files", hint="allow them")

    monkeypatch.setattr(get_backend("host"), "probe", probe)
    finding = doctor.examine("host")
    assert (finding.available, finding.why_not, finding.remedy) == (False, "no memory files", "allow them")
    assert finding.capabilities


@pytest.mark.ranks
def test_demo_is_right_on_every_rank(capsys: Output) -> None:
    assert cli.main(["demo", "--ranks", "2", "--backend", "host", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["backend"], told["ranks"], told["right"]) == ("host", 2, True)
    assert [result["rank"] for result in told["results"]] == [0, 1]
    assert len({result["pid"] for result in told["results"]}) == 2
    for result in told["results"]:
        steps = {step["step"]: step for step in result["steps"]}
        assert list(steps) == ["allocate", "rendezvous", "read peers", "reduce", "write a peer", "contiguous view"]
        assert all(step["right"] is True and step["ms"] > 0 for step in steps.values())
        assert steps["reduce"]["what"] == "sum over all ranks is 3"
        assert steps["read peers"]["what"] == "first elements are [1, 2]"


@pytest.mark.ranks
def test_demo_prints_a_table(capsys: Output) -> None:
    assert cli.main(["demo", "--ranks", "1", "--backend", "host"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("1 processes started by ")
    assert out[2].split() == ["rank", "pid", "step", "ms", "check", "what", "it", "did"]
    assert [line.split()[-1] for line in out[4:5]] == ["'host'"]
    assert out[-1] == "All results are right."


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nosuch"], "nosuch"),
        (["demo", "--ranks", "0"], "expected a whole number from 1, got '0'"),
        (["demo", "--ranks", "two"], "expected a whole number from 1, got 'two'"),
        (["demo", "--rank", "2"], "--rank"),
        (["validate", "--backends", ""], "expected names of backends"),
        (["bench"], "SUITE"),
        (["bench", "gpu", "--peers", "mpi"], "mpi"),
        (["doctor", "everything"], "everything"),
        (["config"], "required"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_wrong(words: list[str], text: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("usage: symmem")
    assert text in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["demo", "--backend", "hots"], "argument backend: unknown backend 'hots'"),
        (["validate", "--backends", "hots", "--no-figures"], "unknown backend 'hots'"),
        (["validate", "--require", "hots", "--no-figures"], "unknown backend 'hots'"),
    ],
)
def test_an_unknown_backend_is_an_error_that_lists_the_valid_ones(words: list[str], text: str, capsys: Output) -> None:
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("symmem: ConfigError: ")
    assert text in err
    assert all(name in err for name in ("auto", *BACKENDS))


def test_a_wrong_variable_is_named(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMMEM_ENABLE", "symmetric_memory_backend(hots)")
    assert cli.main(["demo"]) == 1
    err = capsys.readouterr().err
    assert "SYMMEM_ENABLE, character 26" in err
    assert "did you mean 'host'" in err


def test_the_bench_of_gpus_needs_two(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, words in ((0, []), (1, []), (1, ["--ranks", "2"]), (2, ["--ranks", "1"])):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert cli.main(["bench", "gpu", *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("symmem: UnsupportedError: `bench gpu` needs two GPUs and two ranks")


def test_failed_ranks_and_interrupts_are_no_tracebacks(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException] = [RanksFailedError([Outcome(error=ValueError("odd"), trace="its trace")])]

    def run(as_json: bool) -> int:
        raise raised[0]

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "symmem: RanksFailedError: 1 of 1 ranks failed\n--- rank 0\nits trace\n"
    raised[0] = KeyboardInterrupt()
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "symmem: interrupted\n"


def test_output_that_nobody_reads_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "symmem", "config", "show"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TASK)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "symmem", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=TASK).stdout == f"symmem {VERSION}\n"


def test_version(capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"symmem {VERSION}\n"


def test_no_command_prints_the_help(capsys: Output) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: symmem")
    assert "doctor" in err


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TASK)


def test_doctor_without_torch_says_so_in_one_line() -> None:
    done = python(
        "import sys; sys.modules['torch'] = None; from symmem.tools import cli; sys.exit(cli.main(['doctor']))"
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"symmem: PyTorch is not installed for {sys.executable}: pip install 'torch>=2.11'\n"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_get_a_named_sentence(platform: str) -> None:
    sentence = (
        f"PlatformError: only Linux is supported, and this is {platform!r}\n  What to do: run it in WSL 2 or in a Linux"
    )
    done = python(f"import sys; sys.platform = {platform!r}; import symmem")
    assert (done.returncode, done.stdout) == (1, "")
    assert sentence in done.stderr
    for started in ("sys.argv = ['bin/symmem', 'doctor']", "sys.orig_argv = ['python', '-m', 'symmem', 'doctor']"):
        done = python(f"import sys; sys.platform = {platform!r}; {started}; import symmem.tools.cli")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"symmem: {sentence}")


def test_a_missing_numpy_is_not_reported() -> None:
    """``import torch`` warns about it; the commands hide this warning."""
    code = "import sys; sys.modules['numpy'] = None; from symmem.tools.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_config_check_does_not_import_torch() -> None:
    code = (
        "import sys; from symmem.tools import cli; assert cli.main(['config', 'check']) == 0; "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TASK)
    assert done.returncode == 0, done.stderr
    assert "SYMMEM_ENABLE: nothing set" in done.stdout


def test_a_table_is_aligned_and_has_no_blanks_at_the_end() -> None:
    assert render(("name", "n", "what"), [("a", 10, "long text here"), ("longer", 2, "")]).split("\n") == [
        "name    n   what",
        "------  --  ----",
        "a       10  long text here",
        "longer  2",
    ]
    assert render(("a", "b"), []) == "a  b\n-  -"
    with pytest.raises((ValueError, IndexError)):
        render(("a", "b"), [("only one",)])
