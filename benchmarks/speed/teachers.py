"""What does one more teacher cost a training step?

    python -m benchmarks.speed.teachers [--sizes small paper] [--counts 0 1 2 4 8 16]
                                        [--settings "fp32, winograd" bf16] [--device cpu|cuda]

Students of M = 0 to 16 teachers stand in one process and are timed in turns, whole steps and their
teachers alone. An added teacher costs its own forward pass, and the student a slot more: distiller,
transfer gate, layer normalisation and distance. The bound that the cost is held against: the
teacher's forward operations (direct convolutions) at 80 % of the machine's matrix rate in the
setting's precision, measured in the same run, and 3 % of the step of the student without teachers.

--quick measures a tiny network, for tests. Prints the table and writes results.json and table.md to
docs/results/speed-teachers, of a GPU to speed-teachers-cuda. Runs without Ray, WebDataset and Zarr.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.provenance import median_and_range, say
from benchmarks.speed.compare import peak, timed_beside
from benchmarks.speed.measure import Floors, Run, spread
from benchmarks.speed.options import Effort, effort, options, record_of, works, write
from benchmarks.speed.report import about, describe, markdown, megabytes
from benchmarks.speed.work import Work, ours, prepare_training

COUNTS = (0, 1, 2, 4, 8, 16)
DEFAULTS = {
    "cpu": ("fp32, winograd, fused", "bf16, fused"),
    "cuda": ("bf16, compiled", "bf16, compiled, batched", "tf32, compiled"),
}
RATE_SHARE, STUDENT_SHARE = 0.8, 0.03
"""Of the matrix rate, and of the student's step."""


def measure(
    work: Work, name: str, counts: Sequence[int], floors: Floors, effort: Effort
) -> dict[str, Any]:
    """Seconds of steps and of teachers alone, and memory, by number of teachers.

    Args:
        work: what is computed.
        name: of the setting.
        counts: of teachers, 0 among them.
        floors: measured in every round.
        effort: how long is measured.
    """
    runs: dict[str, Run] = {}
    for count in counts:
        say(f"{name}: {count} teachers")
        own = ours(name, work._replace(num_teachers=count), effort.device)
        runs[f"step {count}"] = own.train
        if count:
            runs[f"teachers {count}"] = own.teach
    times = timed_beside(runs, floors, effort)
    runs.clear()
    found = {}
    for count in counts:
        own_work = work._replace(num_teachers=count)
        found[str(count)] = {
            "seconds": times[f"step {count}"],
            "teachers_seconds": times.get(f"teachers {count}"),
            "operations": own_work.training_operations,
            "peak_bytes": peak(prepare_training, name, own_work, effort),
        }
    return found


def added(found: Mapping[str, Any], count: int) -> list[float]:
    """Seconds that each of so many teachers adds to the step without any, by round."""
    pairs = zip(found[str(count)]["seconds"], found["0"]["seconds"], strict=True)
    return [(taught - alone) / count for taught, alone in pairs]


def bound(case: Mapping[str, Any], floors: Mapping[str, float]) -> float:
    """Seconds that one may add at most."""
    rate = floors["bf16" if case["setting"].startswith("bf16") else "fp32"]
    if case["setting"].startswith("tf32"):
        rate = floors["tf32"]
    step = statistics.median(case["found"]["0"]["seconds"])
    return case["teacher_operations"] / (RATE_SHARE * rate) + STUDENT_SHARE * step


def table(record: Mapping[str, Any]) -> str:
    """Markdown: every size and setting, by number of teachers."""
    lines = [about(record)]
    heads = (
        *("teachers", "s/step: least (median, most)", "added s/teacher: median (least - most)"),
        *("of the bound", "a teacher alone [s]", "a slot of the student [s]", "peak MB"),
    )
    for case in record["cases"]:
        most = bound(case, record["floors"]["per_second"])
        forward = case["teacher_operations"] / 1e9
        counts = f"{min(map(int, case['found']))} to {max(map(int, case['found']))}"
        work = describe({**case["work"], "num_teachers": counts})
        lines += [
            "",
            f"{case['setting']}. {work}. A teacher's forward pass: {forward:,.1f} GFLOP; bound: "
            f"{most:.4f} s.",
            "",
        ]
        rows = []
        for name, row in case["found"].items():
            columns = [name, spread(row["seconds"], 4)]
            columns += _added_columns(case["found"], int(name), most) if int(name) else [""] * 4
            rows.append([*columns, megabytes(row["peak_bytes"])])
        lines += markdown(heads, rows)
    return "\n".join(lines) + "\n"


def _added_columns(found: Mapping[str, Any], count: int, most: float) -> list[str]:
    extra = added(found, count)
    alone = [seconds / count for seconds in found[str(count)]["teachers_seconds"]]
    slot = [both - own for both, own in zip(extra, alone, strict=True)]
    return [
        median_and_range(extra, 4),
        f"{statistics.median(extra) / most:.2f}",
        f"{statistics.median(alone):.4f}",
        f"{statistics.median(slot):.4f}",
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    chosen = parser.parse_args()
    if 0 not in chosen.counts:
        parser.error("--counts needs 0: costs are beyond those of a student without teachers")
    done = effort(chosen)
    floors = Floors(chosen.device, quick=chosen.quick)
    found = []
    for work in works(chosen):
        for name in chosen.settings or DEFAULTS[chosen.device]:
            case = {
                "work": work.facts(),
                "setting": name,
                "teacher_operations": work.teacher_operations,
            }
            found.append(case | {"found": measure(work, name, chosen.counts, floors, done)})
    record = record_of("teachers", chosen, done, floors, {"cases": found})
    write("teachers", chosen, record, table(record))


if __name__ == "__main__":
    main()
