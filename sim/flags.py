"""From what a person typed to a :class:`sim.config.Config`.

Short flags are other spellings of config paths, and so every message speaks of the path:

    --rho .1  is  --attack.rho .1          --model M    is  --text.model M
    --attack x  is  --attack.name x        --data FILE  is  --text.data FILE

``--learner name`` chooses the union's member first, then ``--learner.lr`` and the like set its
fields, and ``--defence`` may be repeated. The rest is tyro's, over the frozen tree, with the chosen
preset and config file as defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterable
from typing import Any

from agents.learners import learners
from envs.registry import parse_spec
from envs.usage import UsageError
from sim import presets
from sim.config import DEFAULT_ATTACK, Config, registered_learner
from sim.config_file import from_file

SHORT = {
    "--rho": "--attack.rho",
    "--attack": "--attack.name",
    "--model": "--text.model",
    "--data": "--text.data",
}
CROWD_ATTACK = "harm_targeted"
"""The default attack's votes, for a crowd that does not ask."""
Options = dict[str, list[str]]
_KINDS = {"FLOAT": "a number", "INT": "a whole number"}
"""What tyro calls types, as files' messages say it."""
_NO = re.compile(r"(^--|\.)no-")


def read(argv: Iterable[str]) -> tuple[str | None, Options]:
    """Split ``argv`` into the preset and every flag's values; a repeated flag adds values.

    Raises:
        ValueError: a word that is neither the leading preset nor a flag's value.
    """
    preset: str | None = None
    flag: str | None = None
    options: Options = {}
    for position, word in enumerate(argv):
        if word.startswith("--") or word == "-h":
            name, equals, value = word.partition("=")
            head, dot, rest = name.partition(".")
            flag = "--help" if word == "-h" else spelled(head + dot + rest.replace("_", "-"))
            options.setdefault(flag, []).extend([value] if equals else [])
        elif flag:
            options[flag].append(word)
        elif position == 0:
            preset = word
        else:
            raise UsageError(f"{word!r} follows the preset; allowed: flags that begin with --")
    return preset, options


def spelled(flag: str) -> str:
    """``flag`` as it is known here: a learner's name, as printed configs have it, is its flag."""
    return "--learner" if flag == "--learner.name" else flag


def over(lower: Options, upper: Options) -> Options:
    """Both, where ``upper`` replaces what ``lower`` says of a field in whatever spelling."""
    said = set(map(_field, upper))
    return {**{flag: given for flag, given in lower.items() if _field(flag) not in said}, **upper}


def _field(flag: str) -> str:
    """The path that ``flag`` sets; a switch under either name sets one."""
    return _NO.sub(r"\1", SHORT.get(flag, flag))


def take(options: Options, flag: str) -> str | None:
    """Remove ``flag`` from ``options``; its one value, or None when it was not given.

    Raises:
        ValueError: not exactly one value.
    """
    values = options.pop(flag, None)
    if values is None:
        return None
    if not values:
        raise UsageError(f"{flag} has no value; allowed: one value behind it")
    if len(values) > 1:
        raise UsageError(
            f"{flag} {' '.join(values)}; allowed: one value (a preset stands before the flags)"
        )
    return values[0]


def switch(options: Options, flag: str) -> bool:
    """Remove ``flag``; whether it is on: given, and not with the value ``false``.

    Raises:
        ValueError: another value than true or false, or several.
    """
    if not options.get(flag):
        return options.pop(flag, None) is not None
    value = str(take(options, flag))
    if value.lower() not in ("true", "false"):
        raise UsageError(f"{flag} {value}; allowed: true, false, or no value")
    return value.lower() == "true"


def whole(options: Options, flag: str) -> int | None:
    """Remove ``flag``; its value as a whole number, or None when it was not given."""
    value = take(options, flag)
    return None if value is None else to_whole(flag, value)


def positive(options: Options, flag: str, default: int) -> int:
    """Remove ``flag``; its value, or ``default`` when it was not given.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    value = whole(options, flag)
    if value is not None and value < 1:
        raise UsageError(f"{flag} {value}; allowed: >= 1")
    return default if value is None else value


def to_whole(flag: str, value: str) -> int:
    """``value`` as a whole number.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{flag} {value}; allowed: a whole number") from None


def build(preset: str | None, options: Options, file: str | None = None) -> Config:
    """The config of one run.

    Args:
        preset: its name; ``default`` when absent.
        options: values by flag, as :func:`read` gives them.
        file: YAML or JSON whose fields replace the preset's, before the flags do.

    Raises:
        ValueError: an unknown name, field, type or range; the message says what is allowed.
    """
    base = presets.preset(preset or "default")
    return changed(from_file(base, file) if file else base, options)


def changed(base: Config, options: Options) -> Config:
    """``base`` with the flags ``options``.

    Raises:
        ValueError: an unknown name, field, type or range; the message says what is allowed.
    """
    options = dict(options)
    if learner := take(options, "--learner"):
        base = dataclasses.replace(base, learner=chosen_learner(base, learner))
    if "--defence" in options:
        base = dataclasses.replace(base, defences=stack(options.pop("--defence")))
    known = paths(base)
    words: list[str] = []
    named: dict[str, str] = {}
    for flag, values in options.items():
        path = SHORT.get(flag, flag)
        if path not in known:
            raise UsageError(unknown_flag(flag, known))
        if (other := named.setdefault(_field(flag), flag)) != flag:
            raise UsageError(f"{other} with {flag}; allowed: one of them")
        if isinstance(known[path], bool):
            on = switch({flag: values}, flag) != bool(_NO.search(flag))
            path, values = _switched(_field(flag), on), []
        elif not isinstance(known[path], tuple | dict):
            values = [str(take({flag: values}, flag))]
        words += [f"{path}={values[0]}"] if len(values) == 1 else [path, *values]
    config = _tyro(base, words)
    typed = {SHORT.get(flag, flag) for flag in options}
    asked = "--attack.rho" in typed and "--attack.name" not in typed
    return with_attack(config) if asked else config  # a typed `none` stays none


def paths(config: Any, prefix: str = "--") -> dict[str, Any]:
    """Every flag of a config tree with its value there; switches under both their names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found |= paths(value, f"{flag}.")
            continue
        found[flag] = value
        if isinstance(value, bool):
            found[_switched(flag, on=False)] = value
    return found


def _switched(flag: str, on: bool) -> str:
    """A switch's name for being on or off: ``--a.b`` or ``--a.no-b``."""
    return flag if on else re.sub(r"(^--|\.)(?=[^.]*$)", r"\1no-", flag)


def unknown_flag(flag: str, known: Iterable[str]) -> str:
    """What to say of a flag that does not exist."""
    known = [*known, *SHORT, "--learner", "--defence", "--out", "--config", "--print-config"]
    section = [k for k in known if k.startswith(flag.partition(".")[0] + ".") and "." in flag]
    near = difflib.get_close_matches(flag, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    allowed = ", ".join(section) or "the flags of `poisonloop run --help`"
    return f"{flag} is not a flag; allowed: {allowed}{hint}"


def chosen_learner(base: Config, spec: str) -> Any:
    """The learner ``spec`` names; one of the base's own kind keeps the base's other fields."""
    name, fields = parse_spec(spec, "learner")
    kind = registered_learner(name)
    built = learners.create(spec)
    if kind is type(base.learner):
        return dataclasses.replace(base.learner, **fields)
    return dataclasses.replace(built)  # a copy without the spec that creation attaches


def stack(values: Iterable[str]) -> tuple[str, ...]:
    """Defence specs in order: ``a+b`` is two, ``none`` is none; a + inside arguments is kept."""
    parts = [p for value in values for p in re.split(r"\+(?![^(]*\))", value)]
    return tuple(part for part in parts if part != "none")


def with_attack(config: Config) -> Config:
    """``config``, with the default attack where there is a rho above 0 and no attack."""
    if config.attack.rho == 0 or config.attack.name != "none":
        return config
    chat = config.feedback.collection == "chat"
    name = DEFAULT_ATTACK if chat else CROWD_ATTACK
    return dataclasses.replace(config, attack=dataclasses.replace(config.attack, name=name))


def show_fields(base: Config) -> None:
    """Print every flag of ``base`` with its docstring and default."""
    with contextlib.suppress(SystemExit):
        _call_tyro(base, ["--help"])


def _tyro(base: Config, words: list[str]) -> Config:
    """Set fields of ``base`` by path; tyro's boxed complaints become one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _call_tyro(base, words)
    except SystemExit:
        raise UsageError(_unboxed(said.getvalue())) from None


def _call_tyro(base: Config, words: list[str]) -> Config:
    import tyro

    kind = tyro.conf.AvoidSubcommands[Config]
    return tyro.cli(kind, default=base, args=words, prog="poisonloop run", description="")


def _unboxed(box: str) -> str:
    """The sentences of a drawn box, without its frame and its pointer to the help text."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    words = [line for line in lines if re.search(r"\w", line) and "For full helptext" not in line]
    text = " ".join(words)
    text = text.removeprefix("Error parsing Config: ")
    choice = re.match(r"invalid choice '(.*)' for argument '--(\S+)'.*one of \('(.*)',?\)", text)
    if choice:
        value, path, allowed = choice.groups()
        return f"{path}={value!r}; allowed: {re.sub(chr(39), '', allowed)}"
    bad_value = re.match(r"Error parsing --(\S+): .*?('.*') Argument helptext: --\S+ (\S+)", text)
    if bad_value:
        path, value, kind = bad_value.groups()
        return f"{path}={value}; allowed: {_KINDS.get(kind, kind)}"
    return re.sub(r"Error parsing \S+: (?=\S+=)", "", text)
