"""The YAML cluster file."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symmem.config import SETTINGS, Cluster, parse_cluster, read_file
from symmem.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"
KINDS = {name: setting.kind for name, setting in SETTINGS.items()}
FULL = """\
version: 1
defaults:
  backend: [native, host]
  arena_size: 1MiB
hosts:
  - match: "dgx-*"
    arena_size: 2MiB
    multicast: off
  - {match: "dgx-1", gpu: "*H200*", arena_size: 3MiB}
groups:
  - match: "tp*"
    arena_size: 4MiB
"""


def parse(text: str) -> Cluster:
    return parse_cluster(textwrap.dedent(text), "c.yaml", KINDS)


def failure(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def parse_or_message(text: str) -> Cluster | str:
    try:
        return parse(text)
    except ConfigError as error:
        return str(error)


def chosen(
    name: str, hostname: str = "x", gpu: str | None = None, group: str | None = None, text: str = FULL
) -> object:
    return parse(text).values(hostname, gpu, () if group is None else (group,))[name].value


@pytest.mark.parametrize(
    ("hostname", "gpu", "group", "mebibytes"),
    [
        ("login", None, None, 1),
        ("DGX-1", None, None, 1),
        ("my-dgx-1", None, None, 1),
        ("dgx-1", None, None, 2),
        ("dgx-1", "NVIDIA A100", None, 2),
        ("dgx-1", "NVIDIA H200", None, 3),
        ("dgx-2", "NVIDIA H200", None, 2),
        ("dgx-1", "NVIDIA H200", "pp0", 3),
        ("dgx-1", "NVIDIA H200", "tp0", 4),
        ("login", None, "tp0", 4),
    ],
)
def test_the_last_and_most_specific_entry_wins(
    hostname: str, gpu: str | None, group: str | None, mebibytes: int
) -> None:
    assert chosen("arena_size", hostname, gpu, group) == mebibytes * 2**20


def test_groups_win_over_hosts_wherever_they_stand_in_the_file() -> None:
    text = """
        groups: [{match: "*", arena_size: 3}]
        hosts: [{match: "*", arena_size: 2}]
        defaults: {arena_size: 1}
        version: 1
        """
    assert chosen("arena_size", group="g", text=text) == 3
    assert chosen("arena_size", text=text) == 2


def test_entries_merge_key_by_key_and_keep_their_places() -> None:
    values = parse(FULL).values("dgx-1", "NVIDIA H200", ())
    assert {name: item.origin for name, item in values.items()} == {
        "backend": "c.yaml:3:3 (defaults)",
        "arena_size": "c.yaml:9:37 (hosts[1])",
        "multicast": "c.yaml:8:5 (hosts[0])",
    }
    assert values["backend"].value == ("native", "host")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("multicast: off", "multicast", "off"),
        ("multicast: 'off'", "multicast", "off"),
        ("backend: host", "backend", ("host",)),
        ("backend: [host]", "backend", ("host",)),
        ("arena_size: 4096", "arena_size", 4096),
        ("arena_size: 1.5KiB", "arena_size", 1536),
        ("signal_timeout: 1e1", "signal_timeout", 10.0),
        ("rendezvous_timeout: 1.5m", "rendezvous_timeout", 90.0),
        ("arena_growth: 1", "arena_growth", 1.0),
    ],
)
def test_values_are_read_as_the_text_in_the_file(line: str, name: str, value: object) -> None:
    assert chosen(name, text=f"version: 1\ndefaults: {{{line}}}") == value


def test_an_alias_repeats_a_value() -> None:
    text = "version: 1\ndefaults: {arena_size: &size 4KiB}\ngroups: [{match: tp, arena_size: *size}]"
    assert chosen("arena_size", group="tp", text=text) == 4096


def in_defaults(line: str) -> str:
    return f"version: 1\ndefaults:\n  {line}\n"


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("{}", "1:1: version", "the key is missing"),
        ("- version", "1:1", "expected a mapping, got a list"),
        ("version", "1:1", "expected a mapping, got a single value"),
        ("version: 2", "1:10: version", "unknown version '2'"),
        ("version: [1]", "1:10: version", "expected a single value, got a list"),
        ("version: 1\nhost: []", "2:1", "unknown key 'host'"),
        ("version: 1\nversion: 1", "2:1", "key 'version' is given twice, first in line 1"),
        ("version: 1\n[a]: 1", "2:1", "expected a single value, got a list"),
        ("version: 1\n<<: {defaults: {}}", "2:1", "unknown key '<<'"),
        ("version: !x 1", "1:10: version", "the tag '!x' is not supported"),
        ("version: !!set {1}", "1:10: version", "is not supported"),
        ("version: 1\ndefaults:", "2:10: defaults", "expected a mapping, got a single value"),
        ("version: 1\ndefaults: &d {arena_size: *d}", "2:11: defaults.arena_size", "got a mapping"),
        ("version: 1\nhosts: {match: x}", "2:8: hosts", "expected a list, got a mapping"),
        ("version: 1\nhosts: &h [*h]", "2:8: hosts[0]", "expected a mapping, got a list"),
        ("version: 1\nhosts: [x]", "2:9: hosts[0]", "expected a mapping, got a single value"),
        ("version: 1\nhosts: [{gpu: x}]", "2:9: hosts[0]", "the key 'match' is missing"),
        ("version: 1\nhosts: [{match: ''}]", "2:17: hosts[0].match", "an empty pattern"),
        ("version: 1\nhosts: [{match: x, gpu: }]", "2:24: hosts[0].gpu", "an empty pattern"),
        ("version: 1\nhosts: [{match: [x]}]", "2:17: hosts[0].match", "expected a single value"),
        ("version: 1\ngroups:\n - {match: x}\n - {}", "4:4: groups[1]", "the key 'match' is missing"),
        ("version: 1\ngroups: [{match: x, gpu: y}]", "2:21: groups[0]", "unknown key 'gpu'"),
        (in_defaults("arena_sise: 1"), "3:3: defaults", "unknown key 'arena_sise'"),
        (in_defaults("arena_size: 1\n  arena_size: 2"), "4:3: defaults", "given twice, first in line 3"),
        (in_defaults("arena_size:"), "3:14: defaults.arena_size", "got nothing"),
        (in_defaults("compile_report: null"), "3:19: defaults.compile_report", "'null' is no value"),
        (in_defaults("compile_report: on"), "3:19: defaults.compile_report", "expected off, or the path"),
        (in_defaults("arena_size: ~"), "3:15: defaults.arena_size", "'~' is no value"),
        ("version: 1\nhosts: [{match: NULL}]", "2:17: hosts[0].match", "'NULL' is no value"),
        (in_defaults("arena_size: true"), "3:15: defaults.arena_size", "got 'true'"),
        (in_defaults("arena_size: [1]"), "3:15: defaults.arena_size", "expected a single value, got a list"),
        (in_defaults("arena_size: 64MB"), "3:15: defaults.arena_size", "unknown unit 'MB'"),
        (in_defaults("signal_timeout: 1:30"), "3:19: defaults.signal_timeout", "expected a time"),
        (in_defaults("signal_timeout: .nan"), "3:19: defaults.signal_timeout", "expected a time"),
        (in_defaults("multicast: false"), "3:14: defaults.multicast", "unknown value 'false'"),
        (in_defaults("backend: []"), "3:12: defaults.backend", "got none"),
        (in_defaults("backend: [host, nativ]"), "3:19: defaults.backend[1]", "unknown backend 'nativ'"),
        (in_defaults("backend: [host, [native]]"), "3:19: defaults.backend[1]", "got a list"),
        (in_defaults("backend: [host, host]"), "3:19: defaults.backend[1]", "named twice"),
        (in_defaults("backend: [host, auto]"), "3:19: defaults.backend[1]", "cannot be combined"),
    ],
)
def test_errors_name_line_column_and_key(text: str, place: str, what: str) -> None:
    message = failure(text)
    assert message.startswith(f"c.yaml:{place}: "), message
    assert what in message.partition("\n")[0], message
    assert "\n  What to do: " in message


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("version: 1\nhost: []", "use one of: version, defaults, hosts, groups; did you mean 'hosts'?"),
        ("version: 1\nhosts: [{match: x, arena_sise: 1}]", "did you mean 'arena_size'?"),
        (in_defaults("backend: nativ"), "use one of: auto, native, pytorch_nccl"),
        (in_defaults("arena_size: 64MB"), "use one of: B, KiB, MiB, GiB, TiB; did you mean 'MiB'?"),
        (in_defaults("multicast: of"), "use one of: auto, off; did you mean 'off'?"),
    ],
)
def test_errors_list_what_is_valid_and_the_nearest(text: str, advice: str) -> None:
    assert advice in failure(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: the file is empty"),
        ("# only a comment\n", "c.yaml: the file is empty"),
        ("version: 1\n  x: 2", "c.yaml:2:4: not valid YAML"),
        ("a: [", "c.yaml:1:5: not valid YAML"),
        ("version: *x", "c.yaml:1:10: not valid YAML: found undefined alias"),
        ("version: 1\n---\nversion: 1", "c.yaml:2:1: not valid YAML"),
        ("version: \x00", "c.yaml: not valid YAML: special characters are not allowed"),
        ('"\\UFFFFFFFF"', "c.yaml: not valid YAML"),
        ('"\\U00110000"', "c.yaml: not valid YAML"),
        ("[" * 20_000, "c.yaml: not a cluster file: nested too deeply"),
    ],
)
def test_what_is_not_yaml_is_a_named_error(text: str, message: str) -> None:
    assert failure(text).startswith(message)


def test_all_entries_are_checked_for_whatever_host_they_are() -> None:
    assert "hosts[0].arena_size" in failure("version: 1\nhosts: [{match: elsewhere, arena_size: 0}]")


def test_a_file_that_cannot_be_read_is_a_named_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError, match=re.escape(f"read the cluster file '{missing}': No such file")):
        read_file(str(missing))
    with pytest.raises(ConfigError, match="Is a directory"):
        read_file(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    for file in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(ConfigError, match="not a regular file"):
            read_file(file)
    with pytest.raises(ConfigError, match="null byte"):
        read_file("a\0b")


def test_a_file_that_is_no_text_is_a_named_error(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"version: \xff")
    with pytest.raises(ConfigError, match="not UTF-8 text at byte 9"):
        read_file(str(file))
    file.write_bytes(bytes(2**20 + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_file(str(file))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfversion: 1")
    assert read_file(str(file)) == "version: 1"


@pytest.mark.parametrize("name", ["laptop", "hgx", "multi-node"])
def test_examples_are_valid(name: str) -> None:
    file = EXAMPLES / f"{name}.yaml"
    assert parse_cluster(read_file(str(file)), str(file), KINDS).entries


@pytest.mark.parametrize(
    ("name", "hostname", "gpu", "group", "expected"),
    [
        ("laptop", "anything", None, None, (("host",), 16 * 2**20)),
        ("hgx", "h", "NVIDIA H200", None, (("native", "pytorch_cuda"), 2**30)),
        ("hgx", "h", "NVIDIA H200", "tp0", (("native", "pytorch_cuda"), 4 * 2**30)),
        ("multi-node", "dgx-01-1", "NVIDIA H200", "dp", (("nvshmem", "pytorch_nvshmem"), 2 * 2**30)),
        ("multi-node", "dgx-01-1", "NVIDIA H200", "tp1", (("native",), 4 * 2**30)),
        ("multi-node", "login-1", None, None, (("host",), 16 * 2**20)),
    ],
)
def test_examples_give_what_their_comments_say(
    name: str, hostname: str, gpu: str | None, group: str | None, expected: tuple[object, object]
) -> None:
    text = read_file(str(EXAMPLES / f"{name}.yaml"))
    assert (
        chosen("backend", hostname, gpu, group, text),
        chosen("arena_size", hostname, gpu, group, text),
    ) == expected


SCALARS = st.sampled_from([*SETTINGS, "version", "match", "gpu", "1", "off", "host", "~", "'", "!!set", "&a", "*a"])
TREES = st.recursive(
    SCALARS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(SCALARS, inner), max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
)
FILES = st.tuples(st.sampled_from(["defaults", "hosts", "groups"]), TREES).map(
    lambda pair: f"version: 1\n{pair[0]}: {pair[1]}"
)


@given(st.text() | TREES | FILES)
def test_any_text_is_a_cluster_file_or_a_config_error(text: str) -> None:
    outcome = parse_or_message(text)
    if isinstance(outcome, str):
        assert outcome.startswith("c.yaml:")
    else:
        assert set(outcome.values("h", "g", ("g",))) <= set(SETTINGS)


def test_a_group_matches_by_any_of_its_names() -> None:
    text = "version: 1\ngroups:\n  - {match: 'tp*', arena_size: 4MiB}\n  - {match: pp, arena_size: 8MiB}\n"
    cluster = parse(text)
    assert cluster.values("h", None, ("1", "mesh_tp", "tp"))["arena_size"].value == 4 << 20
    assert cluster.values("h", None, ("1", "mesh_tp")) == {}
    assert cluster.unmatched(("1", "tp")) == ["groups[1] (match: 'pp')"]
    assert cluster.unmatched(()) == ["groups[0] (match: 'tp*')", "groups[1] (match: 'pp')"]


@given(st.binary(max_size=200))
def test_any_bytes_are_text_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(data)
    try:
        text = read_file(str(file))
    except ConfigError:
        with pytest.raises(UnicodeDecodeError):
            data.decode("utf-8")
    else:
        assert text.encode() == data.removeprefix(b"\xef\xbb\xbf")
