"""Safe reader of the pickles in torch checkpoints: nothing that they name is imported or run.

Each global is replaced by the caller's substitute for its name, or refused. Python's C unpickler is not
used: a few bytes (a memo index) can make it allocate gigabytes.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from fedsft_assets.model.errors import ModelError


@dataclass(frozen=True)
class SafeCallable:
    """The substitute for a global that a pickle may call: the call goes to `function` only."""

    function: Callable[..., object]


@dataclass(eq=False)
class OpaqueObject:
    """An object as described in a pickle, by class name, arguments and state; its class is not imported."""

    class_name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None

    @classmethod
    def constructor(cls, class_name: str) -> SafeCallable:
        """The substitute for a class whose objects become opaque."""
        return SafeCallable(lambda *arguments: cls(class_name, arguments))

    def field(self, name: str) -> Any:
        """The value of an attribute in the state; None if absent."""
        return self.state.get(name) if isinstance(self.state, dict) else None


FindGlobal = Callable[[str], object | None]
PersistentLoad = Callable[[Any], object]


def read_pickle(data: bytes, where: str, find_global: FindGlobal, persistent_load: PersistentLoad | None = None) -> Any:
    """Read a pickle, with `find_global("module.name")` in place of each global.

    `find_global` returns a SafeCallable for a global that may be called, another inert value, or None to refuse
    it; `persistent_load` returns the object of a persistent id. Raises ModelError that begins with `where`.
    """
    try:
        return _SafeUnpickler(data, find_global, persistent_load).load()
    except _Refused as error:
        raise ModelError(f"{where}: {error}") from error
    except Exception as error:  # arbitrary data can fail anywhere
        raise ModelError(f"{where}: is not a pickle written by torch: {type(error).__name__}: {error}") from error


class _Refused(Exception):
    pass


_SAFE_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
)


class _SafeUnpickler(pickle._Unpickler):
    def __init__(self, data: bytes, find_global: FindGlobal, persistent_load: PersistentLoad | None) -> None:
        super().__init__(io.BytesIO(data))
        self._find_global, self._persistent_load = find_global, persistent_load

    def find_class(self, module: str, name: str, /) -> Any:
        found = self._find_global(f"{module}.{name}") if isinstance(module, str) and isinstance(name, str) else None
        if found is None:
            raise _Refused(f"names {str(module)[:100]}.{str(name)[:100]}, which a checkpoint of tensors does not need")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent_load is None:
            raise _Refused("refers to external data")
        return self._persistent_load(pid)

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()  # type: ignore[attr-defined]
        called = self.stack.pop()  # type: ignore[attr-defined]
        if not isinstance(called, SafeCallable) or not isinstance(arguments, tuple):
            raise _Refused(f"calls a {type(called).__name__}")
        self.stack.append(called.function(*arguments))  # type: ignore[attr-defined]

    def _load_build(self) -> None:
        state = self.stack.pop()  # type: ignore[attr-defined]
        target = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(target, OpaqueObject):
            target.state = state
        elif not isinstance(target, OrderedDict):  # its state has module versions, which are ignored
            raise _Refused(f"sets the state of a {type(target).__name__}")

    def _load_setitems(self) -> None:
        self._set_items(self.pop_mark())  # type: ignore[attr-defined]

    def _load_setitem(self) -> None:
        value = self.stack.pop()  # type: ignore[attr-defined]
        self._set_items([self.stack.pop(), value])  # type: ignore[attr-defined]

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]  # type: ignore[attr-defined]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple could take years.
            if not isinstance(target, dict) or not isinstance(key, str | int | OpaqueObject):
                raise _Refused(f"puts a {type(key).__name__} as a key into a {type(target).__name__}")
            target[key] = value

    def _refuse(self) -> NoReturn:
        raise _Refused("has an instruction that torch does not write")

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), _refuse),
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _SAFE_OPCODES},
        pickle.REDUCE[0]: _load_reduce,
        pickle.NEWOBJ[0]: _load_reduce,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.SETITEM[0]: _load_setitem,
    }
