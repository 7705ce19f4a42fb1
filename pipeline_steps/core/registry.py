"""Registry of implementations by role and name: built in, or installed by another package. Examples: docs/how-to/extend.

A built-in implementation is one module of the role's package; its file name is the registered name, or the module is found
when all modules of the package are imported. Another package registers through an entry point of group
`seeing_sound.<role>` whose name is the registered name and whose value is the module that registers it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from pipeline_steps.core.errors import ConfigError, suggest_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations of one role by name.

    Args:
        role: noun for messages and for the entry-point group, e.g. `captioner`.
        package: dotted name of the package whose modules register the built-in implementations.
    """

    def __init__(self, role: str, package: str) -> None:
        self.role = role
        self.package = package
        self.entry_point_group = f"seeing_sound.{re.sub('[ -]', '_', role)}"
        self._implementations: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an implementation under `name`.

        Raises:
            ValueError: another implementation has that name.
        """

        def add(implementation: T) -> T:
            present = self._implementations.setdefault(name, implementation)
            if _identity(present) != _identity(implementation):
                raise ValueError(f"{self.role} {name!r} is registered twice: {_identity(present)}, {_identity(implementation)}")
            self._implementations[name] = implementation
            return implementation

        return add

    def get(self, name: str) -> T:
        """Implementation registered under `name`; imports as few modules as needed.

        Raises:
            ConfigError: no implementation has that name, or its entry point cannot be imported.
        """
        for load in (self._import_module, self._import_entry_point, lambda _name: self._import_package()):
            if name not in self._implementations:
                load(name)
        if name not in self._implementations:
            raise ConfigError(f"unknown {self.role} {name!r}", suggest_name(name, self.names()))
        return self._implementations[name]

    def __contains__(self, name: str) -> bool:
        try:
            self.get(name)
        except ConfigError:
            return False
        return True

    def names(self) -> tuple[str, ...]:
        """Names of all implementations, sorted; imports every built-in module of the role, and no entry point."""
        self._import_package()
        installed = (point.name for point in entry_points(group=self.entry_point_group))
        return tuple(sorted({*self._implementations, *installed}))

    def _import_module(self, name: str) -> None:
        module = f"{self.package}.{name}"
        if name.isidentifier() and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)

    def _import_package(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _import_entry_point(self, name: str) -> None:
        for point in entry_points(group=self.entry_point_group, name=name):
            try:
                point.load()
            except Exception as error:  # any error of foreign code
                raise ConfigError(
                    f"{self.role} {name!r}: entry point {point.value!r} cannot be loaded: {type(error).__name__}: {error}",
                    f"repair or uninstall the package that provides it, or choose another {self.role}",
                ) from error


def _identity(implementation: object) -> str:
    """Module and qualified name: equal for a class whose module was imported again."""
    return f"{getattr(implementation, '__module__', '')}.{getattr(implementation, '__qualname__', repr(implementation))}"
