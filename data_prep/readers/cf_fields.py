"""Which variable of a CF dataset is the radar field, and what its unit makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from data_prep.readers.cf_model import CFDataset, CFOptions, CFVariable
from data_prep.readers.radar import BadFileError, Quantity

_STANDARD_NAMES = {
    "rainfall_rate",
    "rainfall_flux",
    "precipitation_flux",
    "precipitation_rate",
    "lwe_precipitation_rate",
    "rainfall_amount",
    "precipitation_amount",
    "thickness_of_rainfall_amount",
    "lwe_thickness_of_precipitation_amount",
    "equivalent_reflectivity_factor",
    "radar_reflectivity",
    "reflectivity",
}
_USUAL_NAMES = {
    "precipitation",
    "precip",
    "prcp",
    "prec",
    "pcp",
    "pr",
    "prate",
    "tprate",
    "precip_rate",
    "precipitation_rate",
    "precipitation_amount",
    "precipitation_flux",
    "precip_intensity",
    "precipitation_intensity",
    "rain",
    "rr",
    "mmh",
    "rainrate",
    "rain_rate",
    "rain_amount",
    "rain_intensity",
    "rainfall",
    "rainfall_rate",
    "rainfall_flux",
    "rainfall_amount",
    "rainfall_intensity",
    "radar_rainfall",
    "radar_rain_rate",
    "crr_intensity",
    "crri",
    "acrr",
    "accumulation",
    "rainfall_accumulation",
    "precipitation_accumulation",
    "rate",
    "sri",
    "tp",
    "mm",
    "rw",
    "ry",
    "yw",
    "rv",
    "dbz",
    "dbzh",
    "reflectivity",
    "reflectivity_horizontal",
    "zh",
    "th",
    "cmax",
    "cappi",
    "rare",
    "image1_image_data",
    "equivalent_reflectivity_factor",
    "composite_reflectivity",
    "maximum_reflectivity",
    "vil",
}
_NOT_THE_FIELD = re.compile(
    r"(^|_)(qi|qind|quality|flags?|mask|error|err|uncertainty|uncert|prob|probability|count|counts|"
    r"weight|std|stddev|variance|bnds|bounds|lat|lon|height|distance|time)(_|$)"
)
_PER_MM = {
    "mm": 1.0,
    "millimeter": 1.0,
    "millimeters": 1.0,
    "millimetre": 1.0,
    "millimetres": 1.0,
    "kgm-2": 1.0,
    "kg/m2": 1.0,
    "l/m2": 1.0,
    "lm-2": 1.0,
    "m": 1000.0,
    "metre": 1000.0,
    "metres": 1000.0,
    "meter": 1000.0,
    "meters": 1000.0,
    "cm": 10.0,
    "in": 25.4,
    "inch": 25.4,
    "inches": 25.4,
}
_HOURS = {"s": 1 / 3600, "m": 1 / 60, "h": 1.0, "d": 24.0}
_DEPTHS = "|".join(sorted(map(re.escape, _PER_MM), key=len, reverse=True))
_TIMES = "s|secs?|seconds?|min|minutes?|h|hr|hrs|hours?|d|days?"
_AMOUNT = re.compile(
    rf"(?P<factor>\d*\.?\d+(?:e[-+]?\d+)?)?\*?(?P<amount>{_DEPTHS})"
    rf"(?:(?:/|per)(?P<count>\d*\.?\d+)?(?P<per>{_TIMES})|(?P<inverse>{_TIMES})-1)?"
)
_SUPERSCRIPTS = str.maketrans("²⁻¹", "2-1")


class Unit(NamedTuple):
    """What a unit says."""

    quantity: Quantity
    factor: float
    """Values times this are in the quantity's unit."""
    minutes: float | None = None
    """Of a sum: over how long, where the unit says so ("mm/5min")."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """What the values of a field are."""

    quantity: Quantity
    factor: float
    minutes: float | None
    notes: tuple[str, ...] = ()


def parse_unit(text: str) -> Unit | None:
    """Understand a unit of rain or reflectivity; None for every other.

    A depth by a time is a rate, unless the time has a number: "mm/5min" is a sum over 5 minutes.
    """
    text = text.lower().translate(_SUPERSCRIPTS)
    # Powers are written ** or ^ or not at all, products by dots or spaces; 0.1 keeps its dot.
    squeezed = re.sub(r"\*\*|[\s^_()\[\]]|[.·⋅](?!\d)", "", text)
    if squeezed in ("dbz", "dbze", "dbzh"):
        return Unit("reflectivity", 1.0)
    match = _AMOUNT.fullmatch(squeezed.replace("kg/m2s", "kg/m2/s"))
    if match is None:
        return None
    factor = float(match["factor"] or 1) * _PER_MM[match["amount"]]
    per = match["per"] or match["inverse"]
    if per is None:
        return Unit("accumulation", factor)
    hours = _HOURS[per[0]]
    count = float(match["count"] or 1)
    if count != 1:
        return Unit("accumulation", factor, count * hours * 60) if count > 0 else None
    return Unit("rain_rate", factor / hours)


def find_field(dataset: CFDataset, options: CFOptions) -> tuple[CFVariable, Meaning]:
    """Find the field and what its values are.

    By standard name first, then by usual names, then by a unit of rain rate or reflectivity; the
    unit must be understood in each case.

    Raises:
        BadFileError: none, several, or of a unit that is no rain; names the variables and options.
    """
    if options.variable is not None:
        field = dataset.variables.get(options.variable)
        if field is None:
            raise BadFileError(
                dataset.path,
                f"has no variable {options.variable}; it has {', '.join(dataset.variables)}",
            )
        return field, _meaning(dataset, field, options)
    found = candidates(dataset)
    if not found and options.unit is not None:
        found = _named(dataset)
    if not found:
        wrong = [f"{v.name} ({v.text('units') or 'no unit'})" for v in _named(dataset)]
        raise BadFileError(
            dataset.path,
            (
                f"holds {', '.join(wrong)}, of a unit that is not understood"
                if wrong
                else "holds no variable that is known to be rain or reflectivity; it has "
                + (", ".join(dataset.variables) or "none")
            )
            + ". Name the field by the reader options variable=NAME and unit=UNIT",
        )
    if len(found) > 1:
        names = ", ".join(f"{v.name} ({v.text('units') or 'no unit'})" for v in found)
        raise BadFileError(
            dataset.path,
            f"holds several fields: {names}. Choose one by the reader option variable=NAME",
        )
    return found[0], _meaning(dataset, found[0], options)


def candidates(dataset: CFDataset) -> list[CFVariable]:
    """Variables that may be the field, all equally likely."""
    tiers: tuple[list[CFVariable], ...] = ([], [], [])
    for variable in dataset.variables.values():
        if not _may_be_field(variable):
            continue
        unit = _unit_of(variable, variable.text("units"))
        if unit is None:
            continue
        if variable.text("standard_name").lower() in _STANDARD_NAMES:
            tiers[0].append(variable)
        elif variable.short_name in _USUAL_NAMES:
            tiers[1].append(variable)
        elif unit.quantity in ("rain_rate", "reflectivity"):
            tiers[2].append(variable)
    return next((tier for tier in tiers if tier), [])


def _named(dataset: CFDataset) -> list[CFVariable]:
    """Variables that are the field by name, whatever their unit."""
    return [
        variable
        for variable in dataset.variables.values()
        if _may_be_field(variable)
        and (
            variable.text("standard_name").lower() in _STANDARD_NAMES
            or variable.short_name in _USUAL_NAMES
        )
    ]


def _may_be_field(variable: CFVariable) -> bool:
    if len(variable.shape) < 2 or variable.dtype.kind not in "iuf":
        return False
    if "flag_meanings" in variable.attrs or "flag_masks" in variable.attrs:
        return variable.text("standard_name").lower() in _STANDARD_NAMES
    # A standard name with a modifier ("rainfall_rate standard_error") is not the field.
    return not (_NOT_THE_FIELD.search(variable.short_name) or " " in variable.text("standard_name"))


def _unit_of(variable: CFVariable, text: str) -> Unit | None:
    """A unit, in the light of the name: dB, and none at all, are dBZ of what is a reflectivity."""
    names = f"{variable.short_name} {variable.text('standard_name').lower()}"
    if text.lower() in ("", "db") and re.search("dbz|reflectivity", names):
        return None if "differential" in names else Unit("reflectivity", 1.0)
    return parse_unit(text)


def _meaning(dataset: CFDataset, field: CFVariable, options: CFOptions) -> Meaning:
    text = options.unit or field.text("units")
    unit = _unit_of(field, text)
    if unit is None:
        raise BadFileError(
            dataset.path,
            f"{field.name} has the unit {text or 'none'!r}; understood are dBZ, and depths (mm, "
            "kg m-2, m ...) with or without a time (mm h-1, kg m-2 s-1, m s-1, mm/5min ...). Give "
            "the right one by the reader option unit=UNIT",
        )
    notes = () if text else ("The variable has no unit; by its name it was taken as dBZ.",)
    names = f"{field.short_name} {field.text('long_name')} {field.text('standard_name')}".lower()
    if unit.quantity == "accumulation" and re.search(r"\bvil\b|vertically.integrated", names):
        return Meaning(quantity="vil", factor=unit.factor, minutes=None)
    return Meaning(quantity=unit.quantity, factor=unit.factor, minutes=unit.minutes, notes=notes)
