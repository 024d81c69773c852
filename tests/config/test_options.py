"""The grammar of SYMMEM_ENABLE, and of our option in NVFUSER_ENABLE."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symmem.config import Argument, Option, find_option, parse_options
from symmem.errors import ConfigError

T = TypeVar("T")
KNOWN = ("backend", "multicast")
NAME = "backend"
WORDS = st.text(st.characters(blacklist_characters="(),"), min_size=1).filter(lambda word: word == word.strip())
BLANKS = st.text(" \t\n", max_size=3)


def parse(text: str) -> tuple[Option, ...]:
    return parse_options(text, "SYMMEM_ENABLE", KNOWN)


def options_or_message(call: Callable[[], T]) -> T | str:
    try:
        return call()
    except ConfigError as error:
        return str(error)


def failure(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_no_options(text: str) -> None:
    assert parse(text) == ()


def test_names_arguments_and_positions() -> None:
    assert parse(" backend( native ,host), multicast") == (
        Option("backend", (Argument("native", 11), Argument("host", 19)), 2),
        Option("multicast", (), 26),
    )


@pytest.mark.parametrize(
    ("text", "position", "what"),
    [
        ("backend(native", 8, "never closed"),
        ("backend(native,multicast", 8, "never closed"),
        ("multicast,backend(", 18, "never closed"),
        ("backend)", 8, "')' without '('"),
        ("backend(native))", 16, "')' without '('"),
        ("backend(native(host))", 15, "cannot be nested"),
        ("backend(native) host", 17, "expected ',' but got 'host'"),
        ("backend(native)(host)", 16, "expected ','"),
        (",backend", 1, "empty item"),
        ("backend,", 9, "empty item"),
        ("backend, ,multicast", 9, "empty item"),
        ("(native)", 1, "empty item"),
        ("backend()", 9, "empty item"),
        ("backend(native,)", 16, "empty item"),
        ("backend(,native)", 9, "empty item"),
        (" backend,multicast, backend(x)", 21, "given twice, first at character 2"),
    ],
)
def test_malformed_text_names_the_character(text: str, position: int, what: str) -> None:
    message = failure(text)
    assert message.startswith(f"SYMMEM_ENABLE, character {position}: ")
    assert what in message


def test_unknown_option_lists_the_valid_ones_and_the_nearest() -> None:
    message = failure("backend(a), multicas(off)")
    assert message.startswith("SYMMEM_ENABLE, character 13: unknown option 'multicas'")
    assert "use one of: backend, multicast; did you mean 'multicast'?" in message


def test_option_names_are_case_sensitive() -> None:
    assert "unknown option 'Backend'" in failure("Backend")


@given(
    st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=3)), min_size=1, max_size=5, unique_by=lambda item: item[0]),
    st.data(),
)
def test_what_is_written_is_what_is_read(written: list[tuple[str, list[str]]], data: st.DataObject) -> None:
    def pad(word: str) -> str:
        return data.draw(BLANKS) + word + data.draw(BLANKS)

    items = [
        pad(name) + (f"({','.join(map(pad, args))})" + data.draw(BLANKS) if args else "") for name, args in written
    ]
    text = ",".join(items)
    options = parse_options(text, "X", [name for name, _ in written])
    assert [(option.name, [arg.text for arg in option.args]) for option in options] == written
    for part in (part for option in options for part in ((option.name, option.position), *map(_pair, option.args))):
        word, position = part
        assert text[position - 1 :].startswith(word)


def _pair(argument: Argument) -> tuple[str, int]:
    return argument.text, argument.position


@given(st.text() | st.lists(st.sampled_from([*KNOWN, "(", ")", ",", " "]), max_size=12).map("".join))
def test_any_text_parses_or_is_a_config_error(text: str) -> None:
    outcome = options_or_message(lambda: parse(text))
    if isinstance(outcome, str):
        assert outcome.startswith("SYMMEM_ENABLE, character ")
    else:
        assert {option.name for option in outcome} <= set(KNOWN)
        assert text.count("(") == text.count(")") == sum(bool(option.args) for option in outcome)


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("backend(native)", ["native"]),
        ("id_model, backend(host) ,fuse_matmul(a,b)", ["host"]),
        # nvFuser itself accepts a comma at the end.
        ("backend(native,host),", ["native", "host"]),
        ("fuse_matmul,,fuse_matmul(),backend(host)", ["host"]),
        ("other(backend),backend(host)", ["host"]),
    ],
)
def test_our_option_is_found_among_those_of_nvfuser(text: str, args: list[str]) -> None:
    option = find_option(text, "NVFUSER_ENABLE", NAME)
    assert option is not None
    assert [argument.text for argument in option.args] == args
    assert text[option.position - 1 :].startswith(NAME)


@pytest.mark.parametrize("text", ["", ",", "x,x", "x((", "x))(", "other(backend)", "back(x)", "my own backend(x)"])
def test_what_is_not_ours_is_left_alone(text: str) -> None:
    assert find_option(text, "NVFUSER_ENABLE", NAME) is None


@pytest.mark.parametrize(
    ("text", "position", "given"),
    [
        ("symetric_memory_backend(host)", 1, "symetric_memory_backend"),
        ("x(y), symmetric_memory_backends(host)", 7, "symmetric_memory_backends"),
        ("symmetric-memory-backend(host)", 1, "symmetric-memory-backend"),
        ("Symmetric_Memory_Backend(host),", 1, "Symmetric_Memory_Backend"),
        ("symm_mem_backend(host)", 1, "symm_mem_backend"),
        ("symmetric_memory_backend(host),symmetric_memory_backed(native)", 32, "symmetric_memory_backed"),
    ],
)
def test_a_near_miss_of_our_option_is_an_error(text: str, position: int, given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_option(text, "NVFUSER_ENABLE", "symmetric_memory_backend")
    assert caught.value.what == f"NVFUSER_ENABLE, character {position}: unknown option {given!r}"
    assert caught.value.hint == "did you mean 'symmetric_memory_backend'?"


@pytest.mark.parametrize("name", ["id_model", "host_ir_lowering", "memory_promotion", "reuse_zeroed_memory"])
def test_options_of_nvfuser_are_no_near_miss(name: str) -> None:
    assert find_option(f"{name}(x)", "NVFUSER_ENABLE", "symmetric_memory_backend") is None


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("x,backend(native", 10),
        ("x,backend()", 11),
        ("x,backend(a)b", 13),
        ("backend(a),x,backend(a)", 14),
        # It is unclear which program the text after this parenthesis belongs to.
        ("x(y,backend(a)", 12),
    ],
)
def test_an_error_in_our_option_is_an_error(text: str, position: int) -> None:
    with pytest.raises(ConfigError, match=f"^NVFUSER_ENABLE, character {position}: "):
        find_option(text, "NVFUSER_ENABLE", NAME)


@given(st.lists(st.sampled_from([NAME, "x", "(", ")", ",", " "]), max_size=12).map("".join))
def test_any_foreign_text_is_searched_or_is_a_config_error(text: str) -> None:
    outcome = options_or_message(lambda: (find_option(text, "NVFUSER_ENABLE", NAME),))
    if isinstance(outcome, str):
        assert outcome.startswith("NVFUSER_ENABLE, character ")
        assert NAME in text
    else:
        assert outcome[0] is None or outcome[0].name == NAME
