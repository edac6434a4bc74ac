"""Things of one kind that are chosen by name, such as losses or export formats."""

import importlib
from collections.abc import Mapping

from fairseq_stack.errors import InputError, check_choice
from fairseq_stack.extensions import load_installed


class Registry(Mapping):
    """{name: thing}, filled by a decorator.

    The package's own modules register when their names are first asked for, and so do the extensions that are
    installed as packages. A module that is slow to import costs nothing before that.

    Args:
        field: the configuration's field, or the command's option, that chooses; errors name it.
        modules: the package's modules that register, in the order of their things. What the package itself has comes
            before that of extensions.
        entry: makes what is kept out of what is decorated and the decorator's keywords; by default the former is kept.
    """

    def __init__(self, field, modules=(), entry=None):
        self.field = field
        self._modules = list(modules)
        self._entry = entry
        self._found = {}  # name: (what was decorated, what is kept)

    def register(self, name, **options):
        """A decorator that registers a function or a class under a name, and returns it unchanged.

        Raises:
            InputError: the name is taken by something else.
        """

        def decorate(thing):
            taken = self._found.get(name, (thing,))[0]
            # The same place twice is a module that is executed again.
            if (taken.__module__, taken.__qualname__) != (thing.__module__, thing.__qualname__):
                raise InputError(
                    f"{self.field}={name} is taken by {taken.__module__}.{taken.__qualname__}; choose another name"
                )
            self._found[name] = thing, self._entry(thing, **options) if self._entry else thing
            return thing

        return decorate

    def choose(self, name):
        """What is registered under a name.

        Raises:
            InputError: nothing is.
        """
        check_choice(self.field, name, self)
        return self[name]

    def __getitem__(self, name):
        return self._all()[name][1]

    def __iter__(self):
        return iter(self._all())

    def __len__(self):
        return len(self._all())

    def _all(self):
        for module in self._modules:
            importlib.import_module(module)
        load_installed()
        return dict(sorted(self._found.items(), key=lambda item: self._place(item[1][0].__module__)))

    def _place(self, module):
        if module in self._modules:
            return self._modules.index(module)
        return len(self._modules) + (not module.startswith("fairseq_stack."))
