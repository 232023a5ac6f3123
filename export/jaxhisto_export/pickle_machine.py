"""Read what a pickle describes, without running what it asks for.

A pickle is a program of a small stack machine whose instructions can call any function of any
module. This machine knows the same instructions and calls nothing: a global is a name, a call
of it a record of that call. Time and memory are bounded by the length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

# A ResNet101 with Adam's state takes 51,000.
MAX_WORK = 400_000
"""Opcodes, plus items copied by a call; about a second."""

MAX_KEY = 1 << 31  # of an integer key: small ones hash to themselves and cannot be made to collide
MAX_INTEGER_BITS = 256  # a random generator's state takes 128; str() of a huge one takes minutes
SHOWN_CHARACTERS = 80

Builder = Callable[[tuple[Any, ...]], Any]


class Stub:
    """A global, or an object made by calling one: a name with data, nothing that runs.

    Attributes:
      module, name: of the global, whatever they are.
      args: of the call; None of a global that was not called.
      state: what BUILD would have set.
      items: keys and values that would have been set, of a class that is a mapping.
    """

    __slots__ = ("args", "items", "module", "name", "state")

    def __init__(self, module: str, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.module, self.name, self.args = module, name, args
        self.state: Any = None
        self.items: dict[Any, Any] = {}

    @property
    def path(self) -> str:
        """`module.name`, fit for a message."""
        return shown(f"{self.module}.{self.name}")

    def __repr__(self) -> str:
        """Its name alone: what it holds may contain itself."""
        return f"<{self.path}>"


class Mapped(dict[Any, Any]):
    """An OrderedDict of the pickle, with the attributes set on it (`_metadata` of torch)."""

    state: Any = None


def shown(text: str) -> str:
    """At most 80 printable characters of what a file says."""
    printable = "".join(c if c.isprintable() else "?" for c in text[:SHOWN_CHARACTERS])
    return printable + ("..." if len(text) > SHOWN_CHARACTERS else "")


def run_pickle(
    stream: IO[bytes],
    builders: Mapping[str, Builder] | None = None,
    persistent: Builder | None = None,
) -> Any:
    """The object that one pickle describes; the stream stands behind it afterwards.

    Sets come as lists. Keys other than text and small integers are dropped with their values.

    Args:
      stream: bytes of known length (an io.BytesIO): a claimed length is never allocated.
      builders: for calls of these globals (`module.name`), from the arguments to the value.
      persistent: from a persistent id, a tuple, to the value.

    Raises:
      ValueError: a pickle that is damaged or asks for more than the machine does, in a clause;
        a builder's own; and what pickletools meets in a damaged pickle.
    """
    return _Machine(builders or {}, persistent).run(stream)


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, builders: Mapping[str, Builder], persistent: Builder | None) -> None:
        self.builders = {**builders, **dict.fromkeys(_MAPPINGS, self._mapping)}
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.work = 0

    def run(self, stream: IO[bytes]) -> Any:
        for opcode, arg, _ in pickletools.genops(stream):
            self.spend(1)
            name = opcode.name
            if name in _PUSHES:
                if isinstance(arg, int) and arg.bit_length() > MAX_INTEGER_BITS:
                    raise ValueError(f"an integer of {arg.bit_length()} bits")
                self.stack.append(arg)
            elif name in _ACTIONS:
                _ACTIONS[name](self, arg)
            elif name not in _IGNORED:
                raise ValueError(f"the pickle uses {name}, which no checkpoint needs")
        if self.below or len(self.stack) != 1:
            raise ValueError("the pickle ends in the midst of something")
        return self.stack[0]

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > MAX_WORK:
            raise ValueError(f"the pickle takes more than {MAX_WORK} steps")

    def since_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError("the pickle asks for a mark that is not there")
        items, self.stack = self.stack, self.below.pop()
        return items

    def set_items(self, items: list[Any]) -> None:
        """Keys and values by turns, into the mapping on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, Stub):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("the pickle sets items of what is no mapping")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _is_key(key):
                target[key] = value

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Stub):
            raise ValueError("the pickle appends to what is no list")

    def call(self, function: Any, args: Any) -> Any:
        """What a builder makes of it, else the record of the call."""
        if not isinstance(function, Stub) or function.args is not None:
            raise ValueError("the pickle calls what is no global")
        if not isinstance(args, tuple):
            raise ValueError(f"the pickle calls {function.path} without arguments")
        builder = self.builders.get(f"{function.module}.{function.name}")
        return builder(args) if builder else Stub(function.module, function.name, args)

    def build(self, state: Any) -> None:
        """Keeps the state beside the object; of a tensor nobody needs it."""
        if isinstance(self.stack[-1], (Stub, Mapped)):
            self.stack[-1].state = state

    def global_named(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the pickle names a global by something other than text")
        self.stack.append(Stub(module, name))

    def persistent_id(self, identity: Any) -> Any:
        if self.persistent is None or not isinstance(identity, tuple):
            raise ValueError("the pickle refers to something outside it")
        return self.persistent(identity)

    def _mapping(self, args: tuple[Any, ...]) -> Mapped:
        """OrderedDict() or, of old files, OrderedDict([[key, value], ...])."""
        made = Mapped()
        pairs = args[-1] if args else ()  # defaultdict's first argument is a factory
        if isinstance(pairs, dict):
            pairs = list(pairs.items())
        if isinstance(pairs, (list, tuple)):
            self.spend(len(pairs))  # the same list may be copied again and again
            for pair in pairs:
                if isinstance(pair, (list, tuple)) and len(pair) == 2 and _is_key(pair[0]):
                    made[pair[0]] = pair[1]
        return made


_MAPPINGS = (
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    "builtins.dict",
    "__builtin__.dict",
)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < MAX_KEY)


def _make(kind: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    """An object of everything since the mark."""

    def action(machine: _Machine, _: Any) -> None:
        items = machine.since_mark()
        machine.stack.append(kind(items))

    return action


def _push(value: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value())


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def action(machine: _Machine, _: Any) -> None:
        if len(machine.stack) < count:
            raise ValueError("the pickle takes more than is there")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return action


def _mark(machine: _Machine, _: Any) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _dict(machine: _Machine, _: Any) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    machine.set_items(items)


def _setitem(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _append(machine: _Machine, _: Any) -> None:
    value = machine.stack.pop()
    machine.append([value])


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.since_mark()


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.since_mark()


def _put(machine: _Machine, index: Any) -> None:
    machine.memo[int(index)] = machine.stack[-1]


def _memoize(machine: _Machine, _: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, index: Any) -> None:
    if int(index) not in machine.memo:
        raise ValueError("the pickle reads what it never stored")
    machine.stack.append(machine.memo[int(index)])


def _global(machine: _Machine, arg: Any) -> None:
    machine.global_named(*str(arg).split(" ", 1))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.global_named(module, name)


def _reduce(machine: _Machine, _: Any) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, args))


def _newobj_ex(machine: _Machine, _: Any) -> None:
    machine.stack.pop()  # keyword arguments
    _reduce(machine, None)


def _inst(machine: _Machine, arg: Any) -> None:
    items = machine.since_mark()
    _global(machine, arg)
    machine.stack.append(machine.call(machine.stack.pop(), tuple(items)))


def _obj(machine: _Machine, _: Any) -> None:
    function, *args = machine.since_mark()
    machine.stack.append(machine.call(function, tuple(args)))


def _binpersid(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.persistent_id(machine.stack.pop()))


_IGNORED = {"PROTO", "FRAME", "STOP"}

_PUSHES = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}

_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(list),
    "EMPTY_SET": _push(list),  # of a set, whose members could be made to collide
    "EMPTY_DICT": _push(dict),
    "EMPTY_TUPLE": _push(tuple),
    "MARK": _mark,
    "LIST": _make(list),
    "TUPLE": _make(tuple),
    "FROZENSET": _make(tuple),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "DICT": _dict,
    "SETITEM": _setitem,
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "APPEND": _append,
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.since_mark()),
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,  # calls __new__ of a class, which is a call all the same
    "NEWOBJ_EX": _newobj_ex,
    "INST": _inst,
    "OBJ": _obj,
    "BUILD": lambda machine, _: machine.build(machine.stack.pop()),
    "BINPERSID": _binpersid,
}
