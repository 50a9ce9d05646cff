"""How fast is a forecast scored, and what part of an evaluation is that?

    python -m benchmarks.evaluation_speed [--device cpu|cuda] [--rounds 7] [--quick]

Frames like those of digits (64x64), video clips (128x128) and radar (256x256, a quarter of the
pixels not observed), ten lead times. Single scores of one sequence are computed side by side:
plainly, frame by frame with scikit-image and threshold by threshold (`plain`, what this project did
before), and as the project does now. The difference is the largest one between the two, relative
where numbers are above 1. All scores are computed in one thread.

An evaluation forecasts a batch with a TMU student of the paper's size (four layers of 64 channels,
patches of 4, random weights), and scores it and persistence: errors, PSNR and SSIM in eight bits;
of radar also counts and the fractions skill score at 20, 30 and 40 dBZ, the latter at five scales.
The network uses all threads of PyTorch.

Prints the table and writes results.json and table.md to docs/results/evaluation-speed. Runs without
Ray, WebDataset and Zarr.
"""

from __future__ import annotations

from benchmarks.evaluation_speed.measure import CASES, QUICK_CASES, measure
from benchmarks.evaluation_speed.report import table
from benchmarks.provenance import command_line, provenance, publish, record_folder


def main() -> None:
    parser = command_line(__doc__, takes_device=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny frames and networks, for tests")
    chosen = parser.parse_args()
    record = {
        **provenance("benchmarks.evaluation_speed", chosen.device, chosen.revision),
        "rounds": chosen.rounds,
        "cases": measure(
            QUICK_CASES if chosen.quick else CASES, chosen.device, rounds=chosen.rounds
        ),
    }
    publish(record, table(record), record_folder(chosen, "evaluation-speed"))


if __name__ == "__main__":
    main()
