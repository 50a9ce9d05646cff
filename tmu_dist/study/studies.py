"""Which studies there are: every table with numbers, Figures 4 and 7, and questions beyond them."""

from __future__ import annotations

from collections.abc import Mapping

from tmu_dist.config import ConfigError
from tmu_dist.config.checks import nearest
from tmu_dist.study import beyond, digits, people_and_rain
from tmu_dist.study.design import Study

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        digits.table_1(),
        digits.table_2(),
        people_and_rain.table_3(),
        people_and_rain.table_4(),
        people_and_rain.table_5(),
        people_and_rain.table_6(),
        digits.figure_4(),
        digits.figure_7(),
        beyond.beyond_digits(),
        beyond.beyond_parts(),
        beyond.beyond_rain(),
    )
}
ALL = tuple(name for name in STUDIES if not name.startswith("beyond"))
"""What the paper has: `python -m tmu_dist.study all`."""


def get_study(name: str) -> Study:
    """Look a study up.

    Raises:
        ConfigError: no such study; suggests the nearest and tells what there is.
    """
    if name not in STUDIES:
        raise ConfigError(
            f"Unknown study {name!r}.{nearest(name, STUDIES)} Studies: {', '.join(STUDIES)}."
        )
    return STUDIES[name]
