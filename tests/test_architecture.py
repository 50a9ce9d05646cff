"""The rules of the house (docs/architecture.md): who may import whom; what documents name exists.

Imports are read from the source, so nothing heavy is loaded, except in one fresh process.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tmu_dist.config import RunConfig

ROOT = Path(__file__).parents[1]

ROWS = {
    # 0: no torch, no ray
    "tmu_dist": 0,
    "tmu_dist.backbones": 0,
    "tmu_dist.config": 0,
    "tmu_dist.draws": 0,
    "tmu_dist.files": 0,
    "tmu_dist.recipes": 0,
    "tmu_dist.data.manifest": 0,
    "tmu_dist.provenance": 0,
    "tmu_dist.side_by_side": 0,
    "tmu_dist.workspace": 0,
    # 1: islands
    "tmu_dist.arithmetic": 1,
    "tmu_dist.colours": 1,
    "tmu_dist.html_page": 1,
    "tmu_dist.models": 1,
    "tmu_dist.data": 1,
    "tmu_dist.collectives": 1,
    "tmu_dist.folders": 2,
    "tmu_dist.run_folder": 2,
    "tmu_dist.teachers": 2,
    "tmu_dist.transfer": 2,
    "tmu_dist.evaluation": 3,
    "tmu_dist.training": 3,
    # 4: where processes come from
    "tmu_dist.training.launch": 4,
    "tmu_dist.training.many": 4,
    "tmu_dist.training.ray_cluster": 4,
    "tmu_dist.training.ray_failures": 4,
    "tmu_dist.training.ray_group": 4,
    "tmu_dist.training.ray_many": 4,
    "tmu_dist.training.ray_metrics": 4,
    "tmu_dist.training.ray_places": 4,
    "tmu_dist.training.ray_worker": 4,
    # 5: the commands, and what they share
    "tmu_dist.__main__": 5,
    "tmu_dist.commands": 5,
    "tmu_dist.data.__main__": 5,
    "tmu_dist.bundle": 5,
    "tmu_dist.demo": 5,
    "tmu_dist.doctor": 5,
    "tmu_dist.evaluate": 5,
    "tmu_dist.ledger": 5,
    "tmu_dist.memories": 5,
    "tmu_dist.predict": 5,
    "tmu_dist.study": 5,
    "tmu_dist.train": 5,
    "tmu_dist.verify_resume": 5,
    "tmu_dist.zoo": 5,
    "tuning": 5,
}
"""Row of every room. A room imports from lower rows and from itself."""

SIDEWAYS = {
    ("tmu_dist.config", "tmu_dist.backbones"),
    ("tmu_dist.recipes", "tmu_dist.config"),
    ("tmu_dist.recipes", "tmu_dist.workspace"),
    ("tmu_dist.teachers", "tmu_dist.folders"),
    ("tmu_dist.teachers", "tmu_dist.run_folder"),
    ("tmu_dist.transfer", "tmu_dist.teachers"),
    ("tmu_dist.training", "tmu_dist.evaluation"),  # validation is an evaluation
    ("tmu_dist.training.launch", "tmu_dist.training.ray_cluster"),  # when Ray is asked for
    ("tmu_dist.training.launch", "tmu_dist.training.ray_worker"),  # when Ray is asked for
    ("tmu_dist.training.many", "tmu_dist.training.launch"),
    ("tmu_dist.training.many", "tmu_dist.training.ray_many"),  # when Ray is asked for
    ("tmu_dist.training.ray_group", "tmu_dist.training.ray_cluster"),
    ("tmu_dist.training.ray_many", "tmu_dist.training.many"),
    ("tmu_dist.training.ray_many", "tmu_dist.training.ray_cluster"),
    ("tmu_dist.training.ray_many", "tmu_dist.training.ray_places"),
    ("tmu_dist.training.ray_places", "tmu_dist.training.ray_cluster"),
    ("tmu_dist.training.ray_worker", "tmu_dist.training.ray_cluster"),
    ("tmu_dist.training.ray_worker", "tmu_dist.training.ray_failures"),
    ("tmu_dist.training.ray_worker", "tmu_dist.training.ray_group"),
    ("tmu_dist.training.ray_worker", "tmu_dist.training.ray_metrics"),
    ("tmu_dist.training.ray_worker", "tmu_dist.training.ray_places"),
}
"""Rooms that import from a room of the same row. Commands (row 5) may import each other."""

DATA_PREP_MAY_IMPORT = {
    "tmu_dist.data.manifest",  # the format that archives are written in
    "tmu_dist.data.storage",  # where they are written to: folders and object stores, without torch
    "tmu_dist.data.archive",  # finished archives, to look at them; not for `verify`
    "tmu_dist.commands",  # how commands end
    "tmu_dist.colours",  # how radar is drawn, the same for data and forecasts
    "tmu_dist.html_page",  # what all pages share
}

_HOUSE = ("tmu_dist", "tuning")
"""Packages with rows; data_prep stands beside."""

EXTRAS = ("h5py", "netCDF4", "xarray", "eccodes", "rasterio", "av", "pysteps", "cv2", "zarr")
"""Libraries that are heavy or optional: loaded by the function that needs them."""

WITHOUT_TORCH = (
    "tmu_dist.colours",
    "tmu_dist.data.archive",
    "tmu_dist.data.order",
    "tmu_dist.data.storage",
    "tmu_dist.folders",
    "tmu_dist.html_page",
    "tmu_dist.run_folder",
)
"""Modules above row 0 that promise it all the same; row 0 and data_prep do, too."""

ON_BARE_MACHINES = ("tmu_dist.evaluation.operations", "tmu_dist.training.step")
"""What benchmarks of one GPU run, where nothing is installed that reads stores or archives."""

RAY_ROOMS = {
    "tmu_dist.doctor.ray_nodes",
    "tmu_dist.doctor.ray_ranks",
    "tmu_dist.training.ray_cluster",
    "tmu_dist.training.ray_failures",
    "tmu_dist.training.ray_group",
    "tmu_dist.training.ray_many",
    "tmu_dist.training.ray_metrics",
    "tmu_dist.training.ray_places",
    "tmu_dist.training.ray_worker",
    "tuning.engine",
    "tuning.scheduling",
    "tuning.trial",
}


class Import(NamedTuple):
    importer: str
    imported: str
    at_import_time: bool
    """False inside a function or `if TYPE_CHECKING`."""


@cache
def modules(*packages: str) -> dict[str, Path]:
    """Source files by module name."""
    found = {}
    for package in packages or ("tmu_dist", "data_prep", "tuning"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports_of(name: str, path: Path) -> tuple[Import, ...]:
    """Every import statement of a module, inside functions too."""

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, at_import_time) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute in this project"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                imported = whole if whole in modules() else str(node.module)
                yield Import(name, imported, at_import_time)
        is_lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import_time and not is_lazy)

    return tuple(visit(ast.parse(path.read_text()), True))


def all_imports() -> list[Import]:
    return [found for name, path in modules().items() for found in imports_of(name, path)]


def room_of(module: str) -> str | None:
    """The room with the longest name that the module lies in."""
    rooms = [r for r in ROWS if module == r or (r != "tmu_dist" and module.startswith(r + "."))]
    return max(rooms, key=len, default=None)


def may_import(importer: str, imported: str) -> bool:
    here, there = room_of(importer), room_of(imported)
    assert here and there
    if here == there or (here, there) in SIDEWAYS:
        return True
    return ROWS[there] < ROWS[here] or ROWS[there] == ROWS[here] == 5


def loaded_by(module: str) -> set[str]:
    """Everything that importing a module imports, as far as this project's sources tell."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [name.rpartition(".")[0]] if "." in name else []  # packages come first
            if name in modules():
                waiting += [
                    i.imported for i in imports_of(name, modules()[name]) if i.at_import_time
                ]
    return seen


def test_every_module_lies_in_a_room() -> None:
    homeless = [m for m in modules("tmu_dist", "tuning") if room_of(m) is None]
    assert not homeless, f"give {homeless} a row in ROWS and in docs/architecture.md"
    gone = [room for room in ROWS if room not in modules()]
    assert not gone, f"ROWS names rooms that do not exist: {gone}"


def test_the_rules_can_be_broken() -> None:
    assert not may_import("tmu_dist.models.tmu", "tmu_dist.data.loader")
    assert not may_import("tmu_dist.teachers.bank", "tmu_dist.transfer.tmu")
    assert not may_import("tmu_dist.evaluation.runner", "tmu_dist.training.loop")
    assert not may_import("tmu_dist.training.loop", "tmu_dist.training.launch")
    assert not may_import("tmu_dist.config", "tmu_dist.files")
    assert may_import("tmu_dist.data.loader", "tmu_dist.data.manifest")
    assert "torch" in loaded_by("tmu_dist.data.loader")
    assert all("ray" in loaded_by(room) for room in RAY_ROOMS)


def test_rooms_import_from_lower_rows_only() -> None:
    broken = [
        f"{i.importer} (row {ROWS[str(room_of(i.importer))]}) imports {i.imported}"
        for i in all_imports()
        if i.importer.startswith(_HOUSE)
        and i.imported.startswith(_HOUSE)
        and not may_import(i.importer, i.imported)
    ]
    assert not broken, "\n".join(broken)


def test_data_prep_stands_beside() -> None:
    between = {
        (i.importer, i.imported)
        for i in all_imports()
        if i.importer.partition(".")[0] != i.imported.partition(".")[0]
    }
    used = {m for who, m in between if who.startswith("data_prep") and m.startswith("tmu_dist")}
    assert used <= DATA_PREP_MAY_IMPORT, f"data_prep imports {sorted(used - DATA_PREP_MAY_IMPORT)}"
    verifiers = {who for who, m in between if m == "tmu_dist.data.archive" and "verify" in who}
    assert not verifiers, "an error in the reader must not hide in the proof"
    users = {who for who, m in between if who.startswith("tmu_dist") and m.startswith("data_prep")}
    assert all(ROWS[str(room_of(user))] == 5 for user in users), f"not commands: {sorted(users)}"


def test_only_its_rooms_load_ray() -> None:
    users = [
        name
        for name, path in modules("tmu_dist", "data_prep", "tuning", "tests", "benchmarks").items()
        for i in imports_of(name, path)
        if i.at_import_time and (i.imported.partition(".")[0] == "ray" or i.imported in RAY_ROOMS)
    ]
    assert set(users) <= RAY_ROOMS


def test_light_modules_reach_neither_torch_nor_ray() -> None:
    row_0 = [m for m in modules("tmu_dist") if ROWS[str(room_of(m))] == 0]
    for module in (*row_0, *modules("data_prep"), *WITHOUT_TORCH):
        assert not loaded_by(module) & {"torch", "ray"}, module


def test_steps_and_their_counts_need_no_stores() -> None:
    for module in ON_BARE_MACHINES:
        assert not loaded_by(module) & {"ray", "obstore", "webdataset", "zarr"}, module


def test_light_modules_load_neither_torch_nor_ray() -> None:
    """The same in a fresh process, where other packages' imports count, too."""
    light = ["tmu_dist", "tmu_dist.files", *sorted(DATA_PREP_MAY_IMPORT), "data_prep.__main__"]
    script = f"""
import importlib, sys
for module in {light}:
    importlib.import_module(module)
    loaded = {{"torch", "ray", *{EXTRAS}}} & set(sys.modules)
    assert not loaded, f"import {{module}} loads {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Documents

DOCUMENTS = [p for p in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md") if p.is_file()]
SECTIONS = "|".join(f.name for f in dataclasses.fields(RunConfig) if f.name != "output")

_LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")
_FILE = re.compile(r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.py)\b(?::([A-Za-z_][\w.]*\w))?")
_MODULE = re.compile(
    r"(?<![\w./-])((?:tmu_dist|data_prep|tuning)(?:\.[A-Za-z_]\w*)+)(?::([\w.]*\w))?"
)
_FLAG = re.compile(rf"--((?:{SECTIONS})\.[\w.-]*\w)")
TO_BE_WRITTEN = {"tmu_dist.models.cells.coupled:CoupledConvLSTMCell"}
"""The file that docs/adding_a_backbone.md walks through."""
_SETTING = re.compile(rf"`((?:{SECTIONS})\.(?!py\b)[a-z_.]*\w)(?:=[^`]*)?`")


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, methods and assigned names of a file; members as Class.name."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            match node:
                case ast.FunctionDef():
                    yield prefix + node.name
                case ast.ClassDef():
                    yield prefix + node.name
                    yield from visit(node.body, f"{prefix}{node.name}.")
                case ast.Assign() | ast.AnnAssign():
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    found = (name for target in targets for name in ast.walk(target))
                    yield from (prefix + n.id for n in found if isinstance(n, ast.Name))

    return frozenset(visit(ast.parse(path.read_text()).body, ""))


def find_file(name: str) -> Path | None:
    """A path from the root or from tmu_dist/; a bare file name may lie anywhere in the sources."""
    for folder in (ROOT, ROOT / "tmu_dist"):
        if (folder / name).is_file():
            return folder / name
    sources = ("tmu_dist", "data_prep", "tuning", "tests", "benchmarks") if "/" not in name else ()
    return next((path for source in sources for path in (ROOT / source).rglob(name)), None)


def module_exists(dotted: str, attribute: str) -> bool:
    """Whether `a.b:c` or `a.b.c` names a module, or something in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = modules().get(".".join(parts[:length]))
        if path is not None:
            rest = ".".join([*parts[length:], *([attribute] if attribute else [])])
            return not rest or rest in names_in(path)
    return False


def setting_exists(dotted: str) -> bool:
    node: Any = RunConfig()
    for key in dotted.replace("-", "_").split("."):
        if not dataclasses.is_dataclass(node) or not hasattr(node, key):
            return False
        node = getattr(node, key)
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    missing = []
    for link in (first or second for first, second in _LINK.findall(text)):
        target = link.partition("#")[0]
        if target and not re.match(r"[a-z]+:", link) and not (document.parent / target).exists():
            missing.append(f"link {link}")
    for name, attribute in _FILE.findall(text):
        path = find_file(name)
        if path is None or (attribute and attribute not in names_in(path)):
            missing.append(f"{name}:{attribute}" if attribute else name)
    for dotted, attribute in _MODULE.findall(text):
        if not module_exists(dotted, attribute) and f"{dotted}:{attribute}" not in TO_BE_WRITTEN:
            missing.append(f"{dotted}:{attribute}" if attribute else dotted)
    for setting in {*_FLAG.findall(text), *_SETTING.findall(text)}:
        if not setting_exists(setting) and not module_exists(f"tmu_dist.{setting}", ""):
            missing.append(f"setting {setting}")
    assert not missing, f"{document.name} names what does not exist: {missing}"
