"""Things of one kind that are chosen by name, such as losses or export formats."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from fairseq_stack.errors import InputError, check_choice
from fairseq_stack.extensions import load_installed, note_registration

Entry = TypeVar("Entry")
Thing = TypeVar("Thing", bound=Callable)


class Registry(Mapping[str, Entry]):
    """{name: entry}, filled by a decorator.

    The package's own modules register their things when the names are first used, and so do the extensions that are
    installed as packages. Slow imports cost nothing before that.

    Args:
        field: the configuration's field, or the command's option, that chooses a name; errors mention it.
        modules: the package's modules that register, in the order in which their names are listed. The package's own
            names come before those of extensions.
        entry: makes the entry from the decorated thing and the decorator's keywords (default: the thing itself).
    """

    def __init__(self, field: str, modules: Iterable[str] = (), entry: Callable[..., Entry] | None = None) -> None:
        self.field = field
        self._modules = list(modules)
        self._entry = entry
        self._found: dict[str, tuple[Any, Any]] = {}  # name: (decorated thing, entry)

    def register(self, name: str, **options: Any) -> Callable[[Thing], Thing]:
        """Return a decorator that registers a function or a class under a name and returns it unchanged.

        Raises:
            InputError: something else has the name already.
        """

        def decorate(thing: Thing) -> Thing:
            found = thing, self._entry(thing, **options) if self._entry else thing
            self.add(name, found)
            note_registration(self, name, found)
            return thing

        return decorate

    def add(self, name: str, found: tuple[Any, Any]) -> None:
        """Add a pair (decorated thing, entry) under a name.

        Raises:
            InputError: something else has the name already.
        """
        thing = found[0]
        taken = self._found.get(name, found)[0]
        # The same module and name again mean that the module is executed a second time.
        if (taken.__module__, taken.__qualname__) != (thing.__module__, thing.__qualname__):
            raise InputError(
                f"{self.field}={name} is taken by {taken.__module__}.{taken.__qualname__}; choose another name"
            )
        self._found[name] = found

    def discard(self, name: str, found: tuple[Any, Any]) -> None:
        """Remove a pair that `add` has added, if it is there."""
        if self._found.get(name) is found:
            del self._found[name]

    def choose(self, name: str) -> Entry:
        """Return the entry with a name.

        Raises:
            InputError: no entry has this name.
        """
        check_choice(self.field, name, self)
        return self[name]

    def __getitem__(self, name: str) -> Entry:
        return self._all()[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, tuple[Any, Any]]:
        for module in self._modules:
            importlib.import_module(module)
        load_installed()
        return dict(sorted(self._found.items(), key=lambda item: self._rank(item[1][0].__module__)))

    def _rank(self, module: str) -> int:
        if module in self._modules:
            return self._modules.index(module)
        return len(self._modules) + (not module.startswith("fairseq_stack."))
