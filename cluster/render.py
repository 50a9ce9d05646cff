"""Print a cluster file with other values for its knobs.

    python cluster/render.py cluster/gpu.yaml --max-workers 8 --gpu-type p5.48xlarge > my.yaml
    python cluster/render.py cluster/gpu.yaml --help        # the knobs of that file

A knob is a value on a line that ends with `# knob NAME: what it is`: of a key, of a list, or of a
variable in a shell command. It is replaced in the text, so that comments stay; one that stands on
several lines is replaced on all of them.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_LINE = re.compile(
    r"^(?P<before> *(?:- )?(?:[^\s#:]+: +|(?<=- )|(?:export )?(?P<shell>\w+=)))(?P<value>\S.*?)"
    r"(?P<after> +# knob (?P<name>[a-z0-9-]+)(?:: (?P<help>.+))?)$"
)
_PLAIN = re.compile(r"[\w./~@+:=-]+")
"""Texts that YAML takes as they are, if it does not take them for something else."""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list: a,b"}


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A value that users change."""

    help: str
    default: Any
    """A text, a number, true or false, or a list of them; others are of the same kind."""


def main() -> None:
    """Print a file with the values that the command line gives."""
    path = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    path.add_argument("file", type=Path, help="a YAML file of this folder")
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        path.print_help(sys.stderr)
        sys.exit(2)
    given, rest = path.parse_known_args(sys.argv[1:2])[0], sys.argv[2:]
    try:
        text = given.file.read_text()
        knobs = knobs_of(text)
        rendered = render(text, _parse(given.file, knobs, rest))
        if not check(rendered):
            sys.stderr.write("Not checked with Ray's validator: Ray is not installed here.\n")
    except (OSError, ValueError) as error:
        sys.exit(f"{given.file}: {error}")
    sys.stdout.write(rendered)


def knobs_of(text: str) -> dict[str, Knob]:
    """The knobs of a cluster file, by name.

    Raises:
        ValueError: one without help, or with several values, or a comment that is none.
    """
    knobs: dict[str, Knob] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if "# knob " not in line:
            continue
        if (match := _LINE.match(line)) is None:
            raise ValueError(
                f"line {number} has no value for its knob: {line.strip()!r}. "
                "Write `key: VALUE  # knob NAME: what it is`."
            )
        value = yaml.safe_load(match["value"])
        known = knobs.setdefault(match["name"], Knob(help=match["help"] or "", default=value))
        if not known.help:
            raise ValueError(f"line {number}: knob {match['name']} has no help.")
        if value != known.default:
            raise ValueError(
                f"line {number}: knob {match['name']} is {value!r} here and {known.default!r} "
                "above; all its lines need the same value."
            )
    return knobs


def render(text: str, values: Mapping[str, str]) -> str:
    """The text of a cluster file with other values for some of its knobs.

    Raises:
        ValueError: there is no such knob, or a value is of another kind than the one it replaces.
    """
    knobs = knobs_of(text)
    for name in values.keys() - knobs.keys():
        near = difflib.get_close_matches(name, knobs, n=1)
        hint = f"did you mean --{near[0]}?" if near else f"it has {', '.join(knobs)}."
        raise ValueError(f"there is no knob --{name}: {hint}")
    wanted = {name: _read(name, knobs[name], value) for name, value in values.items()}

    def replaced(line: str) -> str:
        match = _LINE.match(line)
        if match is None or match["name"] not in wanted:
            return line
        value = wanted[match["name"]]
        written = _as_shell(value) if match["shell"] else _as_yaml(value)
        return match["before"] + written + match["after"]

    return "".join(
        replaced(line.removesuffix("\n")) + line[len(line.removesuffix("\n")) :]
        for line in text.splitlines(keepends=True)
    )


def check(text: str) -> bool:
    """Refuse a cluster file that would not be accepted.

    Returns:
        Whether all could be checked: files for `ray up` need Ray's own validator.

    Raises:
        ValueError: it is no YAML, or Ray's validator refuses it.
    """
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML: {error}") from None
    configs = [part for part in documents if isinstance(part, dict) and "cluster_name" in part]
    if not configs:
        return True
    with redirect_stdout(io.StringIO()):  # Ray's remarks, which `ray up` makes again
        try:
            from jsonschema import ValidationError
            from ray.autoscaler._private.util import prepare_config, validate_config
        except ImportError:
            return False
        for config in configs:
            try:
                validate_config({"cluster_synced_files": [], "max_workers": 2} | config)
                validate_config(prepare_config(config))  # with the defaults, which need the above
            except ValidationError as error:
                where = ".".join(str(part) for part in error.absolute_path) or "the file"
                raise ValueError(f"{where}: {error.message}") from None
    return True


def _parse(file: Path, knobs: Mapping[str, Knob], words: list[str]) -> dict[str, str]:
    """Values from the command line; a flag that is no knob is left to `render` to refuse."""
    parser = argparse.ArgumentParser(
        prog=f"python cluster/render.py {file}",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, knob in knobs.items():
        shown = _as_yaml(knob.default).replace("%", "%%")
        help_ = knob.help.replace("%", "%%")
        parser.add_argument(
            f"--{name}", metavar="", help=f"{help_} (default: {shown})", default=argparse.SUPPRESS
        )
    known, unknown = parser.parse_known_args(words)
    if unknown and not unknown[0].startswith("--"):
        raise ValueError(f"{unknown[0]!r} is not a knob: write --NAME VALUE.")
    strange = {word.removeprefix("--").partition("=")[0]: "" for word in unknown[:1]}
    return {name.replace("_", "-"): value for name, value in vars(known).items()} | strange


def _read(name: str, knob: Knob, value: str) -> Any:
    """The value that a word of the command line means, of the kind of the default."""
    kind = type(knob.default)
    if kind is str:
        return value
    if kind is list and not value.startswith("["):
        value = f"[{value}]"
    try:
        meant = yaml.safe_load(value)
    except yaml.YAMLError:
        meant = None
    if kind is float and type(meant) is int:
        meant = float(meant)
    if type(meant) is not kind:
        raise ValueError(
            f"--{name} must be {_WORDS[kind]}, such as {_as_yaml(knob.default)}, not {value!r}."
        )
    return meant


def _as_yaml(value: Any) -> str:
    """A value as it is written on one line; JSON, which YAML reads, unless it is a plain text."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _as_shell(value: Any) -> str:
    """A value as one word of a shell; a `~` that begins it still means the home folder."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if _PLAIN.fullmatch(text) else shlex.quote(text)


if __name__ == "__main__":
    main()
