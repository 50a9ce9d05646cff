"""Which parameters of GRIB edition 2 are rain, reflectivity or VIL.

MRMS products (discipline 209) after NSSL's user table, version 12.1; the others after the WMO's
code table 4.2, disciplines 0, categories 1 (moisture), 15 (radar) and 16 (forecast radar imagery).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from data_prep.readers.radar import Quantity

Triple: TypeAlias = tuple[int, int, int]
"""Discipline, category and number of a parameter."""


class Parameter(NamedTuple):
    """What a parameter measures."""

    name: str
    quantity: Quantity
    factor: float = 1.0
    """From the message's unit to the quantity's."""
    interval_minutes: float | None = None
    accumulation_minutes: float | None = None


def _mrms() -> dict[Triple, Parameter]:
    known: dict[Triple, Parameter] = {
        (209, 6, 1): Parameter("PrecipRate", "rain_rate", interval_minutes=2.0),
        (209, 6, 45): Parameter("RadarOnly_QPE_15M", "accumulation", 1.0, 15.0, 15.0),
        (209, 3, 41): Parameter("VIL", "vil", interval_minutes=2.0),
        (209, 14, 1): Parameter("LVL3_HighResVIL", "vil", interval_minutes=2.0),
    }
    sums = (("RadarOnly", "", 2), ("MultiSensor", "_Pass1", 30), ("MultiSensor", "_Pass2", 37))
    for kind, version, first in sums:
        for number, hours in enumerate((1, 3, 6, 12, 24, 48, 72), first):
            name = f"{kind}_QPE_{hours:02}H{version}"
            known[209, 6, number] = Parameter(name, "accumulation", 1.0, None, 60.0 * hours)
    mosaics: dict[Triple, str] = {
        (209, 3, 57): "ReflectivityAtLowestAltitude",
        (209, 3, 58): "MergedReflectivityAtLowestAltitude",
        (209, 8, 8): "SeamlessHSR",
        (209, 9, 0): "MergedReflectivityQC",
        (209, 10, 0): "MergedReflectivityQCComposite",
        (209, 10, 2): "LowLevelCompositeReflectivity",
        (209, 10, 4): "LayerCompositeReflectivity_Low",
        (209, 10, 5): "LayerCompositeReflectivity_High",
        (209, 10, 6): "LayerCompositeReflectivity_Super",
        (209, 10, 9): "LayerCompositeReflectivity_ANC",
        (209, 11, 0): "MergedBaseReflectivityQC",
        (209, 11, 1): "MergedReflectivityComposite",
        (209, 11, 2): "MergedReflectivityQComposite",
        (209, 11, 3): "MergedBaseReflectivity",
    }
    for triple, name in mosaics.items():
        known[triple] = Parameter(name, "reflectivity", interval_minutes=2.0)
    return known


_PER_SECOND = 3600.0
PARAMETERS: Mapping[Triple, Parameter] = {
    **_mrms(),
    (0, 1, 7): Parameter("precipitation rate", "rain_rate", _PER_SECOND),
    (0, 1, 8): Parameter("total precipitation", "accumulation"),
    (0, 1, 49): Parameter("total water precipitation", "accumulation"),
    (0, 1, 52): Parameter("total precipitation rate", "rain_rate", _PER_SECOND),
    (0, 1, 65): Parameter("rain precipitation rate", "rain_rate", _PER_SECOND),
    (0, 15, 1): Parameter("base reflectivity", "reflectivity"),
    (0, 15, 4): Parameter("layer-maximum base reflectivity", "reflectivity"),
    (0, 15, 5): Parameter("precipitation from radar", "accumulation"),
    (0, 15, 17): Parameter("radar precipitation rate", "rain_rate", _PER_SECOND),
    (0, 16, 4): Parameter("reflectivity", "reflectivity"),
    (0, 16, 5): Parameter("composite reflectivity", "reflectivity"),
    (0, 16, 6): Parameter("forecast radar precipitation rate", "rain_rate", _PER_SECOND),
}
