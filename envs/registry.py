"""The open doors: learners, attacks, annotators and defences, found and built from a short spec.

A spec is what a person types after ``--attack`` or ``--defence``:

    harm_targeted                      a registered name
    harm_targeted(eta=0.5)             with keyword arguments, Python literals only
    my_module:MyDefence(alpha=2)       an importable class of the user's own
    path/to/file.py:MyDefence          a class in a file
    their_name                         an installed package's entry point in ``poisonloop.<kind>``

Registering is done by decorating the class in a file of its own; nothing else lists it.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from envs.usage import UsageError, blamed_on, check_types


class Registry:
    """Named components of one kind, discovered in every module of one package.

    Args:
        kind: what messages call them.
        package: where they are.
        base: what every component that is created must be an instance of.
    """

    def __init__(self, kind: str, package: str, base: type = object):
        self.kind = kind
        self.package = package
        self.base = base
        self._makers: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Class or function decorator: make the component available as ``name``."""

        def decorate(maker: Any) -> Any:
            if name in self._makers:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._makers[name] = maker
            maker.registered = name
            return maker

        return decorate

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._makers)

    def summaries(self) -> dict[str, str]:
        """The first docstring line of every component, by name."""
        return {n: (inspect.getdoc(self._makers[n]) or "").split("\n")[0] for n in self.names()}

    def get(self, name: str) -> Callable[..., Any]:
        """The maker registered, importable or installed as ``name``.

        Raises:
            ValueError: unknown name.
        """
        return self._resolve(name)

    def name_of(self, maker: Any) -> str:
        """The name ``maker`` is registered under."""
        return next(name for name, known in self._makers.items() if known is maker)

    def create(self, spec: str) -> Any:
        """Build the component that ``spec`` names; it remembers the spec as ``.spec``.

        Raises:
            UsageError: unknown name, wrong argument, not of the form ``name(key=literal, ...)``, or
                code of a person's own that fails or makes something else.
        """
        target, arguments = parse_spec(spec, self.kind)
        maker = self._resolve(target)
        if not callable(maker):
            raise UsageError(f"{self.kind}: {spec!r} names no class; allowed: {self._wanted}")
        self._check_arguments(spec, maker, arguments)
        with blamed_on(f"{self.kind}: {spec!r} cannot be made", "what its constructor accepts"):
            component = maker(**arguments)
        if not isinstance(component, self.base):
            made = type(component).__name__
            raise UsageError(f"{self.kind}: {spec!r} makes a {made}; allowed: {self._wanted}")
        object.__setattr__(component, "spec", spec)  # also on frozen dataclasses
        return component

    @property
    def _wanted(self) -> str:
        return f"a subclass of {self.base.__module__}.{self.base.__qualname__}"

    def _check_arguments(self, spec: str, maker: Callable[..., Any], given: dict[str, Any]) -> None:
        """Compare names and types of a spec's arguments with what ``maker`` says it takes."""
        try:
            signature = inspect.signature(maker, eval_str=True)
        except Exception:  # an annotation that cannot be evaluated outside a type checker
            signature = inspect.signature(maker)
        try:
            signature.bind(**given)
        except TypeError as error:
            allowed = ", ".join(signature.parameters) or "none"
            raise UsageError(
                f"{self.kind}: bad arguments in {spec!r} ({error}); allowed: {allowed}"
            ) from None
        hints = {name: p.annotation for name, p in signature.parameters.items()}
        check_types(given, hints, f"in {spec!r}: {self.kind}.")

    def _discover(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _resolve(self, target: str) -> Callable[..., Any]:
        if ":" in target:
            return load_object(target, self.kind)
        self._discover()
        if target in self._makers:
            return self._makers[target]
        for point in importlib.metadata.entry_points(group=f"poisonloop.{self.kind}"):
            if point.name == target:
                with blamed_on(f"{self.kind}: {target!r} cannot be imported", "working code"):
                    return point.load()
        near = difflib.get_close_matches(target, self._makers, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"{self.kind}: unknown name {target!r}; allowed: {', '.join(self.names())}, "
            f"or module:Class, or path/to/file.py:Class{hint}"
        )


def is_plugin(spec: str) -> bool:
    """Whether ``spec`` names code outside the project (and so needs trust on resume)."""
    return ":" in spec.split("(", 1)[0]


def absolute(spec: str) -> str:
    """``spec`` with the path of a file in full, so that it is found from any folder."""
    target, paren, arguments = spec.partition("(")
    where, colon, name = target.rpartition(":")
    if not where.endswith(".py"):
        return spec
    return f"{Path(where).resolve()}{colon}{name}{paren}{arguments}"


def shortest(spec: str) -> str:
    """``spec`` without empty parentheses, which mean what none mean."""
    return spec.strip().removesuffix("()")


def brief(spec: str) -> str:
    """``spec`` without the folder of a file, for names and tables."""
    spec = shortest(spec)
    target, paren, arguments = spec.partition("(")
    where, colon, name = target.rpartition(":")
    return f"{Path(where).name}{colon}{name}{paren}{arguments}" if colon else spec


def parse_spec(spec: str, kind: str) -> tuple[str, dict[str, Any]]:
    """Split ``target(key=literal, ...)`` into the target and its arguments.

    Arguments are read with ``ast.literal_eval``; nothing in a spec is ever executed.
    """
    target, paren, rest = spec.strip().partition("(")
    if not target or (paren and not rest.endswith(")")):
        raise UsageError(f"{kind}: cannot read {spec!r}; write name or name(key=value, ...)")
    if not paren:
        return target, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args and all(k.arg for k in call.keywords)
        return target, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, AssertionError):
        raise UsageError(
            f"{kind}: cannot read the arguments of {spec!r}; "
            "write name(key=value, ...) with numbers, quoted strings, booleans, tuples"
        ) from None


def load_object(target: str, kind: str) -> Any:
    """Import ``module:Name`` or ``path/to/file.py:Name``; the working folder is importable."""
    where, _, name = target.rpartition(":")
    with blamed_on(f"{kind}: cannot import {where!r}", "a module or file that Python can import"):
        if where.endswith(".py"):
            path = Path(where).resolve()
            place = hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()
            name_of_file = f"poisonloop_plugin_{path.stem}_{place}"  # two files may share a stem
            spec = importlib.util.spec_from_file_location(name_of_file, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise UsageError(f"{kind}: no Python file at {where!r}; allowed: an existing one")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(where)
    if not hasattr(module, name):
        raise UsageError(f"{kind}: {where!r} has no {name!r}; allowed: a class in it")
    return getattr(module, name)
