"""Reads the pickles that torch puts into checkpoints, without importing or running anything that they name.

A name becomes what the caller says that it stands for, or an error. Python's own C unpickler is not
used: a few bytes (an index of its memo) make it allocate gigabytes.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from fedsft_assets.model.errors import ModelError


@dataclass(frozen=True)
class Maker:
    """What a name stands for that a pickle may call: all that a call does is this function of ours."""

    make: Callable[..., object]


@dataclass(eq=False)
class OpaqueObject:
    """An object as a pickle describes it, of a class that is never looked at: its arguments and its state."""

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None

    @classmethod
    def maker(cls, kind: str) -> Maker:
        return Maker(lambda *arguments: cls(kind, arguments))

    def field(self, name: str) -> Any:
        """The value of a field, None if it is not there."""
        return self.state.get(name) if isinstance(self.state, dict) else None


Known = Callable[[str], object | None]


def read_pickle(data: bytes, where: str, known: Known, stored: Callable[[Any], object] | None = None) -> Any:
    """The content of a pickle, with `known(name)` in place of each thing that it names as `module.name`.

    `known` returns a Maker for what may be called, any other inert value, or None for what is refused;
    `stored` gives what a persistent id stands for. Raises ModelError that begins with `where`.
    """
    try:
        return _Reader(data, known, stored).load()
    except _Refused as error:
        raise ModelError(f"{where}: {error}") from error
    except Exception as error:  # anything may be in the data, and fail anywhere
        raise ModelError(f"{where}: is no pickle that torch writes: {type(error).__name__}: {error}") from error


class _Refused(Exception):
    pass


_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
)


class _Reader(pickle._Unpickler):
    def __init__(self, data: bytes, known: Known, stored: Callable[[Any], object] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._known, self._stored = known, stored

    def find_class(self, module: str, name: str, /) -> Any:
        found = self._known(f"{module}.{name}") if isinstance(module, str) and isinstance(name, str) else None
        if found is None:
            raise _Refused(f"names {str(module)[:100]}.{str(name)[:100]}, which a checkpoint of tensors has no use for")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._stored is None:
            raise _Refused("refers to data outside of it")
        return self._stored(pid)

    def _call(self) -> None:
        arguments = self.stack.pop()  # type: ignore[attr-defined]
        maker = self.stack.pop()  # type: ignore[attr-defined]
        if not isinstance(maker, Maker) or not isinstance(arguments, tuple):
            raise _Refused(f"calls a {type(maker).__name__}")
        self.stack.append(maker.make(*arguments))  # type: ignore[attr-defined]

    def _build(self) -> None:
        state = self.stack.pop()  # type: ignore[attr-defined]
        target = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(target, OpaqueObject):
            target.state = state
        elif not isinstance(target, OrderedDict):  # whose state are the versions of modules
            raise _Refused(f"sets the state of a {type(target).__name__}")

    def _set_items(self) -> None:
        self._set(self.pop_mark())  # type: ignore[attr-defined]

    def _set_item(self) -> None:
        value = self.stack.pop()  # type: ignore[attr-defined]
        self._set([self.stack.pop(), value])  # type: ignore[attr-defined]

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]  # type: ignore[attr-defined]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A nested tuple as a key can take years to hash.
            if not isinstance(target, dict) or not isinstance(key, str | int | OpaqueObject):
                raise _Refused(f"puts a {type(key).__name__} as a key into a {type(target).__name__}")
            target[key] = value

    def _refuse(self) -> NoReturn:
        raise _Refused("has an instruction that torch does not write")

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), _refuse),
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES},
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.SETITEMS[0]: _set_items,
        pickle.SETITEM[0]: _set_item,
    }
