"""The vocabulary of errors: their texts, and that they reach other ranks unchanged."""

from __future__ import annotations

import builtins
import copy
import json
import pickle
from collections.abc import Callable

import pytest

from symmem import errors
from symmem.errors import PeerTimeoutError, RendezvousError, SymmemError, from_wire, to_wire

CLASSES = sorted(
    (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SymmemError)),
    key=lambda cls: cls.__name__,
)
FIELDS = {"what": "it broke", "hint": "mend it", "rank": 3, "group": "tp", "step": "rendezvous", "peers": (1, 2)}
COPIES: dict[str, Callable[[SymmemError], SymmemError]] = {
    "wire": lambda error: from_wire(json.loads(json.dumps(to_wire(error)))),
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def make(cls: type[SymmemError]) -> SymmemError:
    options = dict(FIELDS)
    return cls(options.pop("what"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("way", COPIES)
def test_every_class_survives_the_way(cls: type[SymmemError], way: str) -> None:
    for error in (make(cls), cls("only this")):
        again = COPIES[way](error)
        assert again is not error
        assert type(again) is cls
        assert {name: getattr(again, name) for name in FIELDS} == {name: getattr(error, name) for name in FIELDS}
        assert str(again) == str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_text_says_where_what_and_what_to_do(cls: type[SymmemError]) -> None:
    assert str(make(cls)) == "[rank 3, group tp, step rendezvous] it broke\n  What to do: mend it"
    assert str(cls("it broke")) == "it broke"
    assert str(cls("it broke", rank=0, hint="mend it")) == "[rank 0] it broke\n  What to do: mend it"


def test_every_class_is_public_and_documented() -> None:
    assert {cls.__name__ for cls in CLASSES} == set(errors.__all__) - {"to_wire", "from_wire"}
    assert all(cls.__doc__ for cls in CLASSES)


@pytest.mark.parametrize(
    ("name", "standard"),
    [
        ("ConfigError", ValueError),
        ("InvalidArgumentError", ValueError),
        ("NotSymmetricError", ValueError),
        ("RankError", IndexError),
        ("OutOfMemoryError", MemoryError),
        ("PeerTimeoutError", TimeoutError),
        ("UnsupportedError", NotImplementedError),
        ("BackendUnavailableError", RuntimeError),
        ("PeerLostError", RuntimeError),
        ("PlatformError", ImportError),
    ],
)
def test_standard_exceptions_of_the_same_meaning_catch_it(name: str, standard: type[Exception]) -> None:
    assert getattr(builtins, standard.__name__) is standard
    with pytest.raises(standard):
        raise make(getattr(errors, name))


def test_located_fills_in_only_what_is_unknown() -> None:
    error = PeerTimeoutError("late", step="barrier", peers=(1,))
    assert error.located(rank=0, group="tp", step="rendezvous") is error
    assert (error.rank, error.group, error.step) == (0, "tp", "barrier")
    error.located(rank=5, group="dp", step="other")
    assert (error.rank, error.group, error.step) == (0, "tp", "barrier")


@pytest.mark.parametrize("foreign", [KeyError("x"), OSError(24, "Too many open files"), KeyboardInterrupt()])
def test_an_exception_of_another_library_is_told_as_text(foreign: BaseException) -> None:
    error = from_wire(json.loads(json.dumps(to_wire(foreign))))
    assert type(error) is RendezvousError
    assert error.what == f"{type(foreign).__name__}: {foreign}"
    assert (error.rank, error.hint, error.peers) == (None, None, ())


@pytest.mark.parametrize("name", ["FutureError", "Any", "to_wire", "__doc__", "Exception"])
def test_a_type_that_is_unknown_here_is_still_an_error_of_ours(name: str) -> None:
    """A rank with another version may send it; nothing but our own classes is ever called."""
    error = from_wire({"type": name, "what": "it broke", "peers": [1]})
    assert type(error) is RendezvousError
    assert (error.what, error.peers) == ("it broke", (1,))


def test_peers_are_a_tuple_whatever_was_given() -> None:
    assert SymmemError("it broke", peers=[2, 3]).peers == (2, 3)  # type: ignore[arg-type]
