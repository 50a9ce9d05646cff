"""Named runs. A recipe is a function that returns a run's config and what must exist before it.

Deliberately not here: doing anything. `tmu_dist.train` prepares and runs a recipe.
"""

from __future__ import annotations

from tmu_dist.config import ConfigError
from tmu_dist.config.checks import nearest
from tmu_dist.recipes import digits, people, radar
from tmu_dist.recipes.base import Recipe, Recipes, by_whole_name

EXPERIMENTS: dict[str, Recipes] = digits.experiments() | radar.experiments()
STUDY_EXPERIMENTS: dict[str, Recipes] = (
    digits.study_experiments() | radar.study_experiments() | people.experiments()
)
"""What `python -m tmu_dist.study` needs beyond those."""
RECIPES: Recipes = by_whole_name(EXPERIMENTS | STUDY_EXPERIMENTS)
DEFAULT_RECIPE = "digits-tmu"


def get_recipe(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        ConfigError: no such recipe; suggests the nearest and tells what there is.
    """
    if name not in RECIPES:
        hint = nearest(name, RECIPES)
        raise ConfigError(f"Unknown recipe {name!r}.{hint} Recipes: {overview()}.")
    return RECIPES[name]()


def overview() -> str:
    """All recipes in a few words: names, and the prefixes that go with them."""
    prefixes: dict[tuple[str, ...], list[str]] = {}
    for prefix, recipes in (EXPERIMENTS | STUDY_EXPERIMENTS).items():
        prefixes.setdefault(tuple(recipes), []).append(prefix)
    return "; ".join(
        f"PREFIX-NAME with PREFIX {', '.join(of)} and NAME {', '.join(names)}"
        for names, of in prefixes.items()
    )
