"""Values, sources and their precedence, and multicast safety."""

from __future__ import annotations

import dataclasses
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symmem.config import (
    BACKENDS,
    SETTINGS,
    Settings,
    gpu_model,
    installed_backends,
    load_node_settings,
    load_settings,
    multicast_blocker,
    reference_table,
)
from symmem.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"
BLOCKERS = [
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "no"),
    ("NVSHMEM_DISABLE_NVLS", "1"),
    ("NCCL_NVLS_ENABLE", "0"),
    ("NCCL_NVLS_ENABLE", " 0x0"),
]
ClusterFile = Callable[[str], dict[str, str]]


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterFile:
    """Write a cluster file; returns the environment that names it."""

    def write(text: str) -> dict[str, str]:
        file = tmp_path / "cluster.yaml"
        file.write_text(text)
        return {"SYMMEM_CONFIG": str(file)}

    return write


def failure(overrides: Mapping[str, object] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides, environ=environ)
    return str(caught.value)


def settings_or_message(overrides: Mapping[str, object], environ: Mapping[str, str]) -> Settings | str:
    try:
        return load_settings(overrides, environ=environ)
    except ConfigError as error:
        return str(error)


def test_defaults_are_valid_and_say_so() -> None:
    settings = load_settings(environ={})
    assert settings == Settings()
    assert settings.origins == dict.fromkeys(SETTINGS, "default")
    for name, setting in SETTINGS.items():
        assert load_settings({name: setting.default}, environ={}) == settings


def test_settings_are_frozen_hashable_and_can_be_sent_to_other_processes() -> None:
    settings = load_settings({"arena_size": 4096}, environ={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.arena_size = 1  # type: ignore[misc]
    assert hash(settings) == hash(dataclasses.replace(settings, origins={}))
    copy = pickle.loads(pickle.dumps(settings))
    assert copy == settings
    assert copy.origins == settings.origins


def test_precedence(cluster: ClusterFile) -> None:
    environ = cluster("version: 1\ndefaults: {arena_size: 2}\ngroups:\n  - match: g\n    arena_size: 3\n")
    file = environ["SYMMEM_CONFIG"]

    def found(overrides: Mapping[str, object] | None = None, group: str | None = None) -> tuple[int, str]:
        settings = load_settings(overrides, group=group, environ=environ)
        return settings.arena_size, settings.origins["arena_size"]

    assert found() == (2, f"{file}:2:12 (defaults)")
    assert found(group="g") == (3, f"{file}:5:5 (groups[0])")
    environ["SYMMEM_ENABLE"] = "multicast(off), arena_size(4)"
    assert found(group="g") == (4, "SYMMEM_ENABLE, character 17")
    assert found({"arena_size": 5}, group="g") == (5, "argument")
    assert found({"arena_size": None}, group="g") == (4, "SYMMEM_ENABLE, character 17")


@pytest.mark.parametrize(
    ("symmem", "nvfuser", "backend", "origin"),
    [
        ("", "symmetric_memory_backend(pytorch_nccl)", ("pytorch_nccl",), "NVFUSER_ENABLE, character 1"),
        ("", "x(y), symmetric_memory_backend(host),z", ("host",), "NVFUSER_ENABLE, character 7"),
        ("multicast(off)", "symmetric_memory_backend(host)", ("host",), "NVFUSER_ENABLE, character 1"),
        (
            "symmetric_memory_backend(native, host)",
            "symmetric_memory_backend(pytorch_cuda)",
            ("native", "host"),
            "SYMMEM_ENABLE, character 1",
        ),
        ("", "multicast(maybe),arena_size", ("auto",), "default"),
    ],
)
def test_the_backend_is_read_from_both_variables(
    symmem: str, nvfuser: str, backend: tuple[str, ...], origin: str
) -> None:
    settings = load_settings(environ={"SYMMEM_ENABLE": symmem, "NVFUSER_ENABLE": nvfuser})
    assert (settings.backend, settings.origins["backend"]) == (backend, origin)


def test_nvfuser_wins_over_the_cluster_file(cluster: ClusterFile) -> None:
    environ = cluster("version: 1\ndefaults: {backend: host}")
    environ["NVFUSER_ENABLE"] = "symmetric_memory_backend(native)"
    assert load_settings(environ=environ).backend == ("native",)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_given_in_every_way(name: str, cluster: ClusterFile, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    table = tmp_path / "table.yaml"
    row = "{operation: reduce_scatter, world: 2, kernel: reduce_scatter, threads: 64, blocks: 1}"
    table.write_text(f"version: 1\nrows: [{row}]")
    example, value = {
        "backend": ("host", ("host",)),
        "multicast": ("off", "off"),
        "rendezvous_timeout": ("30s", 30.0),
        "signal_timeout": ("1.5m", 90.0),
        "arena_size": ("1GiB", 2**30),
        "arena_growth": ("1.5", 1.5),
        "arena_limit": ("3GiB", 3 * 2**30),
        "allocation_check": ("each", "each"),
        "symmetric_arguments": ("copy", "copy"),
        "collective_check": ("each", "each"),
        "algorithms": (str(table), str(table)),
        "compile_report": (str(table.parent / "report"), str(table.parent / "report")),
        "compiled_collectives": ("on", "on"),
        "inspection": ("off", "off"),
        "torch_backend": ("on", "on"),
    }[name]
    assert value != setting.default
    for settings in (
        load_settings({name: example}, environ={}),
        load_settings({name: value}, environ={}),
        load_settings(environ={"SYMMEM_ENABLE": f"{setting.option}({example})"}),
        load_settings(environ=cluster(f"version: 1\ndefaults: {{{name}: {example}}}")),
    ):
        assert getattr(settings, name) == value
        assert [key for key, origin in settings.origins.items() if origin != "default"] == [name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend(host)", "1: unknown option 'backend'"),
        ("symmetric_memory_backend(native, natve)", "34: symmetric_memory_backend: unknown backend 'natve'"),
        ("symmetric_memory_backend", "1: symmetric_memory_backend: expected a backend, got none"),
        (
            "symmetric_memory_backend(host,host)",
            "31: symmetric_memory_backend: backend 'host' is named twice",
        ),
        ("symmetric_memory_backend(auto,host)", "26: symmetric_memory_backend: 'auto' cannot be combined"),
        ("multicast", "1: multicast: expected one value, got none"),
        ("multicast(auto, off)", "17: multicast: expected one value, got 2"),
        ("multicast(on)", "11: multicast: unknown value 'on'"),
        ("arena_size(0)", "12: arena_size: '0' is not within 1 to 9223372036854775807 bytes"),
    ],
)
def test_errors_in_the_environment_name_the_character(text: str, message: str) -> None:
    assert failure(SYMMEM_ENABLE=text).startswith(f"SYMMEM_ENABLE, character {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,symmetric_memory_backend(natve)", "28: symmetric_memory_backend: unknown backend 'natve'"),
        ("symmetric_memory_backend", "1: symmetric_memory_backend: expected a backend, got none"),
        ("symmetric_memory_backend(native", "25: '(' is never closed"),
    ],
)
def test_errors_in_our_option_of_nvfuser_are_errors(text: str, message: str) -> None:
    # Even if SYMMEM_ENABLE wins: an invalid text is never ignored.
    ours = "symmetric_memory_backend(host)"
    assert failure(NVFUSER_ENABLE=text, SYMMEM_ENABLE=ours).startswith(f"NVFUSER_ENABLE, character {message}")


def test_an_unknown_backend_lists_the_valid_ones_and_the_nearest() -> None:
    message = failure(SYMMEM_ENABLE="symmetric_memory_backend(natve)")
    assert f"use one of: auto, {', '.join(BACKENDS)}" in message
    assert message.endswith("did you mean 'native'?")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("backends", "host", "unknown setting 'backends'"),
        ("backend", (), "argument backend: expected a backend, got none"),
        ("backend", ["host", 1], "argument backend[1]: expected the name of a backend; got 1"),
        ("backend", {"host"}, "argument backend: expected the name of a backend; got a value of type set"),
        ("backend", "", "argument backend: unknown backend ''"),
        ("multicast", False, "argument multicast: unknown value False"),
        ("arena_size", True, "argument arena_size: expected a size"),
        ("arena_size", 4096.0, "argument arena_size: expected a size"),
        ("arena_size", [4096], "argument arena_size: expected a size"),
        ("arena_size", -1, "argument arena_size: -1 is not within 1 to"),
        ("arena_size", 2**63, "argument arena_size: 9223372036854775808 is not within 1 to"),
        pytest.param("arena_size", 10**5000, "argument arena_size: an integer of 16610 bits is not within", id="huge"),
        ("arena_size", "8388608TiB", "argument arena_size: '8388608TiB' is not within 1 to"),
        ("arena_size", "0.3KiB", "argument arena_size: '0.3KiB' is not a whole number of bytes"),
        pytest.param("arena_size", "9" * 5000, "argument arena_size: expected a size", id="long"),
        ("arena_size", "1e3", "argument arena_size: expected a size"),
        ("arena_size", "64 mib", "argument arena_size: unknown unit 'mib' in '64 mib'"),
        ("arena_size", "٣", "argument arena_size: expected a size"),
        ("signal_timeout", False, "argument signal_timeout: expected a time"),
        ("signal_timeout", 0, "argument signal_timeout: 0 is not more than 0"),
        ("signal_timeout", -0.5, "argument signal_timeout: -0.5 is not more than 0"),
        ("signal_timeout", float("nan"), "argument signal_timeout: nan is not more than 0"),
        ("signal_timeout", float("inf"), "argument signal_timeout: inf is not more than 0"),
        ("signal_timeout", 10**400, "argument signal_timeout: an integer of"),
        ("signal_timeout", timedelta(0), "argument signal_timeout: a value of type timedelta is not more"),
        ("signal_timeout", "1e999", "argument signal_timeout: '1e999' is not more than 0"),
        ("signal_timeout", "25d", "argument signal_timeout: unknown unit 'd' in '25d'"),
        ("signal_timeout", "577h", "argument signal_timeout: '577h' is not more than 0 and at most"),
        ("signal_timeout", "nan", "argument signal_timeout: expected a time"),
        ("arena_growth", 0.99, "argument arena_growth: 0.99 is not within 1 to 1024"),
        ("arena_growth", "2x", "argument arena_growth: unknown unit 'x'"),
        ("arena_growth", float("nan"), "argument arena_growth: nan is not within"),
        ("arena_growth", True, "argument arena_growth: expected a factor"),
    ],
)
def test_errors_in_arguments_name_them(name: str, value: object, message: str) -> None:
    text = failure({name: value})
    assert text.startswith(message), text
    assert "\n  What to do: " in text


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("500ms", 0.5), ("2 m", 120), ("1h", 3600), (7, 7), (timedelta(days=24), 24 * 86400)],
)
def test_times(value: object, seconds: float) -> None:
    read = load_settings({"signal_timeout": value}, environ={}).signal_timeout
    assert read == seconds
    assert type(read) is float


@given(st.integers(1, 2**63 - 1))
def test_sizes_are_read_as_they_are_written(size: int) -> None:
    text = SETTINGS["arena_size"].kind.format(size)
    assert load_settings({"arena_size": text}, environ={}).arena_size == size


@given(st.floats(1e-9, 24 * 86400))
def test_times_are_read_as_they_are_written(seconds: float) -> None:
    text = SETTINGS["signal_timeout"].kind.format(seconds)
    assert load_settings({"signal_timeout": text}, environ={}).signal_timeout == seconds


@given(st.floats(1, 1024))
def test_factors_are_read_as_they_are_written(factor: float) -> None:
    text = SETTINGS["arena_growth"].kind.format(factor)
    assert load_settings({"arena_growth": text}, environ={}).arena_growth == factor


def texts_of(*names: str) -> st.SearchStrategy[str]:
    """Texts that are mostly options with these names."""
    argument = st.sampled_from(["off", "auto", "host", "1", "2KiB", "", "x"])
    option = st.tuples(st.sampled_from(names), argument).map(lambda pair: f"{pair[0]}({pair[1]})")
    return st.text() | st.lists(option | st.text("(), x", max_size=2), max_size=4).map(",".join)


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.timedeltas()


@given(st.sampled_from([*SETTINGS]), ANYTHING | st.lists(ANYTHING) | st.dictionaries(st.text(), ANYTHING))
def test_any_argument_is_valid_or_a_config_error(name: str, value: object) -> None:
    outcome = settings_or_message({name: value}, {})
    if isinstance(outcome, str):
        assert outcome.startswith(f"argument {name}")
    else:
        # A parsed value is accepted again, unchanged.
        assert load_settings({name: getattr(outcome, name)}, environ={}) == outcome


@given(texts_of("arena_size", "multicast", "arena_growth"), texts_of("symmetric_memory_backend", "x"))
def test_any_environment_is_valid_or_a_config_error(symmem: str, nvfuser: str) -> None:
    outcome = settings_or_message({}, {"SYMMEM_ENABLE": symmem, "NVFUSER_ENABLE": nvfuser})
    if isinstance(outcome, str):
        assert "_ENABLE, character " in outcome
    else:
        assert set(outcome.origins) == set(SETTINGS)


def test_backends_of_other_packages_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "thirdparty-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[symmem.backends]\nquantum = thirdparty:Backend\n")
    assert "unknown backend 'quantum'" in failure({"backend": "quantum"})
    monkeypatch.syspath_prepend(tmp_path)
    assert "quantum" in installed_backends()
    assert load_settings({"backend": ["quantum", "host"]}, environ={}).backend == ("quantum", "host")
    assert "host, quantum; did you mean 'quantum'?" in failure({"backend": "quantun"})


@pytest.mark.parametrize(("variable", "value"), BLOCKERS)
def test_multicast_is_off_when_the_environment_forbids_it(variable: str, value: str, cluster: ClusterFile) -> None:
    environ = cluster("version: 1\ndefaults: {multicast: auto}")
    environ |= {"SYMMEM_ENABLE": "multicast(auto)", variable: value}
    settings = load_settings({"multicast": "auto"}, environ=environ)
    assert settings.multicast == "off"
    assert settings.origins["multicast"] == f"{variable}={value}"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0"),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", ""),
        ("NVSHMEM_DISABLE_NVLS", "0"),
        ("NCCL_NVLS_ENABLE", "1"),
        ("NCCL_NVLS_ENABLE", "2"),
        ("NCCL_NVLS_ENABLE", ""),
    ],
)
def test_multicast_is_allowed_otherwise(variable: str, value: str) -> None:
    assert load_settings(environ={variable: value}).multicast == "auto"


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(8KiB)")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    for name in ("SYMMEM_CONFIG", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"):
        monkeypatch.delenv(name, raising=False)
    assert load_settings().arena_size == 8192
    assert multicast_blocker() == "NCCL_NVLS_ENABLE=0"


def test_an_empty_name_of_a_cluster_file_is_none() -> None:
    assert load_settings(environ={"SYMMEM_CONFIG": ""}) == Settings()


def test_changes_of_the_cluster_file_are_seen(cluster: ClusterFile) -> None:
    for size in (4096, 8192):
        environ = cluster(f"version: 1\ndefaults: {{arena_size: {size}}}")
        assert load_settings(environ=environ).arena_size == size


def test_host_and_gpu_are_found_out(cluster: ClusterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    monkeypatch.setattr("symmem.config.settings.gpu_model", lambda: "NVIDIA H200")
    environ = cluster("version: 1\nhosts: [{match: node-7, arena_size: 1}, {match: '*', gpu: '*', arena_size: 2}]")
    assert load_settings(environ=environ).arena_size == 2
    assert load_settings(environ=environ, gpu="").arena_size == 1
    assert load_settings(environ=environ, gpu="", hostname="other").arena_size == 64 * 2**20


def test_settings_of_another_host(cluster: ClusterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("symmem.config.settings.gpu_model", lambda: "NVIDIA H200")  # of this host, not of the other
    environ = cluster(
        "version: 1\nhosts: [{match: a*, arena_size: 1}, {match: a1, gpu: '*H*', arena_size: 2}]\n"
        "groups: [{match: tp, arena_size: 3}]"
    )
    assert load_node_settings("a0", environ=environ).arena_size == 1
    assert load_node_settings("b", environ=environ).arena_size == 64 * 2**20
    assert load_node_settings("a1", "NVIDIA H100", environ=environ).arena_size == 2
    assert load_node_settings("a1", "", environ=environ).arena_size == 1
    assert load_node_settings("a0", group="tp", environ=environ).arena_size == 3
    with pytest.raises(ConfigError, match=r"hosts\[1\] applies to the host 'a1' if its GPU model matches '\*H\*'"):
        load_node_settings("a1", environ=environ)


def test_the_gpu_model_is_what_the_driver_says(tmp_path: Path) -> None:
    assert gpu_model(str(tmp_path)) is None
    for bus, model in (("0000:1b:00.0", "NVIDIA H200"), ("0000:43:00.0", "other")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {model}\nIRQ:   18\nBus Type: PCIe\n")
    assert gpu_model(str(tmp_path)) == "NVIDIA H200"


def test_the_reference_has_the_generated_table() -> None:
    text = (DOCS / "configuration.md").read_text()
    assert text.count(reference_table()) == 1
    assert text.count("| setting and YAML key |") == 1


def test_torch_is_never_imported() -> None:
    code = "import sys, symmem.config; symmem.config.load_settings(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
