"""`tmu-dist COMMAND ...`, the same as `python -m tmu_dist.COMMAND ...`."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "train": "train one run",
    "evaluate": "score a trained model on one split, beside persistence",
    "predict": "draw what a model predicts for chosen sequences",
    "zoo": "list, show and add teachers",
    "data": "who reads what when; the loader beside the bare storage",
    "memories": "price, make and verify files of what teachers tell (placement.kind=cached)",
    "doctor": "is everything in order on every node, before GPUs are paid for?",
    "verify_resume": "the drill: does a killed run continue as if nothing had happened?",
    "ledger": "every method and control from one recipe: is it the teachers that help?",
    "study": "the tables and figures of the paper, run again and set beside it",
    "bundle": "what a bug report about a run needs, in one file",
    "demo": "from raw digits to a transferred student, with a report",
}
PACKAGES = ("data", "doctor", "ledger", "study", "verify_resume")
"""Commands that are more than one file."""


def main() -> None:
    """Run one command; without one, list them."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        lines = [f"  {command:15}{text}" for command, text in COMMANDS.items()]
        sys.stderr.write(
            "usage: tmu-dist COMMAND ... (each has --help)\n" + "\n".join(lines) + "\n"
        )
        raise SystemExit(0 if name in ("", "-h", "--help") else 2)
    module = f"tmu_dist.{name}" + (".__main__" if name in PACKAGES else "")
    import_module(module).main(sys.argv[2:])


if __name__ == "__main__":
    main()
