"""Named runs. A recipe is a function that returns a run's config and what must exist before it.

Deliberately not here: doing anything. `tmu_dist.train` prepares and runs a recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from tmu_dist.config import ConfigError
from tmu_dist.recipes import digits, radar
from tmu_dist.recipes.base import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = digits.recipes() | radar.recipes()
DEFAULT_RECIPE = "digits-tmu"


def get_recipe(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        ConfigError: no such recipe; lists them and suggests the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"Unknown recipe {name!r}.{hint} Recipes: {', '.join(RECIPES)}.")
    return RECIPES[name]()
