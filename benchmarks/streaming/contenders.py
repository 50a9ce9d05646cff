"""The loaders that this benchmark compares, each in a process and, where needed, environment of its
own.

    python -m benchmarks.streaming.contenders NAME PLACE [--core N]    answers requests on stdin
    python -m benchmarks.streaming.contenders NAME PLACE --write       writes the library's format

A contender turns a place (a folder of data.py, or the URL of one) into passes: one pass
iterates over all samples once, shuffled, in batches. The process loads its library once and then
waits; the command asks one process after the other for a pass, so that rounds are interleaved and
idle contenders cost nothing. Here are numpy and other loaders: this file needs numpy, torch,
zstandard and the contender's library only. This project's loader is in ours.py.

Shape letters: N samples, B samples of a batch, T time, C channels, H height, W width.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import mmap
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import MagicMock

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 8
SHUFFLE_BUFFER = 256
"""Samples in webdataset's shuffle buffer: 330 MB of radar."""
_CHUNK_BYTES = 64 << 20
"""Of the shards that others write, as of the tars."""

Passes: TypeAlias = Callable[[int], Iterable[Any]]
"""From the number of a pass to its batches: tensors_BTCHW of uint8."""


def memmap(place: str) -> Passes:
    """numpy, the yardstick: random rows of one uncompressed array, stacked as loaders do."""
    samples_NTCHW = np.load(Path(place) / "samples.npy", mmap_mode="r")

    def one_pass(number: int) -> Iterator[torch.Tensor]:
        for ids in _random_batches(len(samples_NTCHW), number):
            yield torch.from_numpy(np.stack([samples_NTCHW[i] for i in ids]))

    return one_pass


def memmap_at_once(place: str) -> Passes:
    """The same rows by one selection a batch: the fastest that numpy can do."""
    samples_NTCHW = np.load(Path(place) / "samples.npy", mmap_mode="r")

    def one_pass(number: int) -> Iterator[torch.Tensor]:
        for ids in _random_batches(len(samples_NTCHW), number):
            yield torch.from_numpy(samples_NTCHW[ids])

    return one_pass


def memmap_dataloader(place: str) -> Passes:
    """The same array under torch's data loader, which stacks samples: what many people use."""
    samples = _Samples(place)
    loader = DataLoader(samples, batch_size=BATCH_SIZE, shuffle=True)
    return lambda number: loader


def zstd_at_offsets(place: str) -> Passes:
    """zstandard, the yardstick of compressed samples: one blob, known offsets, decode and copy."""
    with (Path(place) / "samples.zst").open("rb") as file:
        blob = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    ends = np.load(Path(place) / "samples.zst.ends.npy").tolist()
    starts = [0, *ends[:-1]]
    shape = np.load(Path(place) / "samples.npy", mmap_mode="r").shape[1:]
    decompress = zstandard.ZstdDecompressor().decompress

    def one_pass(number: int) -> Iterator[torch.Tensor]:
        for ids in _random_batches(len(ends), number):
            batch = np.empty((len(ids), *shape), np.uint8)
            for row, i in enumerate(ids.tolist()):
                frames = np.frombuffer(decompress(blob[starts[i] : ends[i]]), np.uint8)
                batch[row] = frames.reshape(shape)
            yield torch.from_numpy(batch)

    return one_pass


def webdataset(place: str) -> Passes:
    """Stock webdataset over the same tars: shuffled shards, a shuffle buffer, its own decoding."""
    import webdataset as wds

    shards = sorted(str(path) for path in (Path(place) / "tars" / "train").glob("*.tar"))
    samples = wds.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(SHUFFLE_BUFFER)
    if _is_compressed(place):
        decompress = zstandard.ZstdDecompressor().decompress
        arrays = samples.map(
            lambda sample: np.load(io.BytesIO(decompress(sample["frames.npy.zst"])))
        )
    else:
        arrays = samples.decode(only="frames.npy").map(lambda sample: sample["frames.npy"])
    batches = arrays.batched(BATCH_SIZE, collation_fn=lambda rows: torch.from_numpy(np.stack(rows)))
    return lambda number: batches


def zarr_samples(place: str) -> Passes:
    """zarr-python over an array with one chunk a sample; faster than orthogonal selections."""
    import zarr

    array = zarr.open_array(Path(place) / "zarr-samples", mode="r")

    def one_pass(number: int) -> Iterator[torch.Tensor]:
        for ids in _random_batches(array.shape[0], number):
            yield torch.from_numpy(np.stack([array[i] for i in ids.tolist()]))

    return one_pass


def zarr_frames(place: str) -> Passes:
    """zarr-python over this project's Zarr archive: one slice of frames a sample."""
    import zarr

    manifest = json.loads((Path(place) / "zarr" / "manifest.json").read_text())
    array = zarr.open_array(
        Path(place) / "zarr" / "train" / manifest["units"]["quantity"], mode="r"
    )
    num_frames = manifest["num_frames"]

    def one_pass(number: int) -> Iterator[torch.Tensor]:
        for ids in _random_batches(array.shape[0] // num_frames, number):
            samples = [array[i * num_frames : (i + 1) * num_frames] for i in ids.tolist()]
            yield torch.from_numpy(np.stack(samples)[:, :, None])

    return one_pass


def zarr_frames_by_zarrs(place: str) -> Passes:
    """The same with the codecs of zarrs."""
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})
    return zarr_frames(place)


def litdata(place: str, folder: str = "litdata") -> Passes:
    """litdata's format, shuffle and data loader; compressed samples as it has them by default."""
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found]

    dataset = StreamingDataset(f"{place}/{folder}", shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=0)
    return lambda number: loader


def litdata_chunks(place: str) -> Passes:
    """litdata with whole compressed shards, which it decompresses to disk the first time."""
    return litdata(place, "litdata-chunks")


def mosaicml_streaming(place: str) -> Passes:
    """MosaicML streaming's format and shuffle under torch's data loader; it decompresses whole
    shards to disk the first time."""
    _stub_torchvision()
    from streaming import StreamingDataset  # type: ignore[import-not-found]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]

    clean_stale_shared_memory()  # of a run that was killed; it would refuse the folder
    dataset = StreamingDataset(local=f"{place}/mds", shuffle=True, batch_size=BATCH_SIZE)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH_SIZE)
    return lambda number: (batch["frames"] for batch in loader)


CONTENDERS: Mapping[str, Callable[[str], Passes]] = {
    "memmap": memmap,
    "memmap_at_once": memmap_at_once,
    "memmap_dataloader": memmap_dataloader,
    "zstd_at_offsets": zstd_at_offsets,
    "webdataset": webdataset,
    "litdata": litdata,
    "litdata_chunks": litdata_chunks,
    "mosaicml_streaming": mosaicml_streaming,
    "zarr_samples": zarr_samples,
    "zarr_frames": zarr_frames,
    "zarr_frames_by_zarrs": zarr_frames_by_zarrs,
}


def write_litdata(place: str, folder: str = "litdata", **options: str) -> None:
    """Write the samples in litdata's format, compressed ones in frames of 256 (its default)."""
    import litdata as library

    samples = _Samples(place)
    library.optimize(
        fn=samples.__getitem__,
        inputs=list(range(len(samples))),
        output_dir=f"{place}/{folder}",
        num_workers=1,
        chunk_bytes=_CHUNK_BYTES,
        compression="zstd:1" if _is_compressed(place) else None,
        verbose=False,
        **options,
    )


def write_litdata_chunks(place: str) -> None:
    """Write the samples in litdata's format, shards compressed as a whole."""
    write_litdata(place, "litdata-chunks", compression_level="chunk")


def write_mosaicml_streaming(place: str) -> None:
    """Write the samples in the MDS format, shards compressed as a whole."""
    _stub_torchvision()
    from streaming import MDSWriter

    samples_NTCHW = _Samples(place).samples_NTCHW
    shape = ",".join(map(str, samples_NTCHW.shape[1:]))
    with MDSWriter(
        out=f"{place}/mds",
        columns={"frames": f"ndarray:uint8:{shape}"},
        compression="zstd:1" if _is_compressed(place) else None,
        size_limit=_CHUNK_BYTES,
    ) as writer:
        for frames_TCHW in samples_NTCHW:
            writer.write({"frames": frames_TCHW})


WRITERS: Mapping[str, Callable[[str], None]] = {
    "litdata": write_litdata,
    "litdata_chunks": write_litdata_chunks,
    "mosaicml_streaming": write_mosaicml_streaming,
}
"""Of contenders whose formats are not among those of data.py."""


class _Samples(Dataset[torch.Tensor]):
    """Samples by number; picklable, because litdata writes in another process."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.samples_NTCHW = np.load(Path(place) / "samples.npy", mmap_mode="c")

    def __reduce__(self) -> tuple[Any, ...]:
        return _Samples, (self.place,)

    def __len__(self) -> int:
        return len(self.samples_NTCHW)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.samples_NTCHW[number])


def _random_batches(num_samples: int, number: int) -> Iterator[NDArray[np.int64]]:
    order = np.random.default_rng(number).permutation(num_samples)
    return (order[i : i + BATCH_SIZE] for i in range(0, num_samples, BATCH_SIZE))


def _is_compressed(place: str) -> bool:
    return place.endswith("-zstd")


def _stub_torchvision() -> None:
    """Let `import streaming` pass without torchvision; only its vision data sets use it."""
    if importlib.util.find_spec("torchvision") is None:
        # Before the stub: it looks whether there is a torchvision.
        importlib.import_module("transformers.utils")
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            sys.modules["torchvision" + name] = MagicMock()
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]


def serve(one_pass: Passes) -> None:
    """Say that all is loaded; then answer requests on stdin, one JSON object a line, to its end.

    A request has the `number` of its first pass, the `seconds` to go on for (whole passes, one at
    least) and whether to `check`. The answer has samples, wall and CPU seconds; a checked one the
    sum of the samples' checksums, which shows whether all have been there, and one of their order.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        measure = _checked if request.pop("check") else _timed
        print(json.dumps(measure(one_pass, **request)), file=answers, flush=True)


def _timed(one_pass: Passes, number: int, seconds: float) -> dict[str, float]:
    samples, wall, cpu = 0, 0.0, 0.0
    while wall < seconds or not samples:
        batches = one_pass(number)
        started, cpu_started = time.perf_counter(), time.process_time()
        for batch in batches:
            samples += len(batch)
        wall += time.perf_counter() - started
        cpu += time.process_time() - cpu_started
        number += 1
    return {"samples": samples, "seconds": wall, "cpu_seconds": cpu}


def _checked(one_pass: Passes, number: int, seconds: float) -> dict[str, float]:
    started = time.perf_counter()
    checksums = [zlib.crc32(memoryview(frames.numpy())) for b in one_pass(number) for frames in b]
    return {
        "samples": len(checksums),
        "seconds": time.perf_counter() - started,
        "sum": sum(checksums),
        "order": zlib.crc32(repr(checksums).encode()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name")
    parser.add_argument("place")
    parser.add_argument("--core", type=int, help="the only core to run on")
    parser.add_argument("--write", action="store_true", help="write the format of NAME")
    chosen = parser.parse_args()
    if chosen.write:
        WRITERS[chosen.name](chosen.place)
        return
    if chosen.core is not None:
        os.sched_setaffinity(0, {chosen.core})
        torch.set_num_threads(1)
    if chosen.name in CONTENDERS:
        contender = CONTENDERS[chosen.name]
    else:
        from benchmarks.streaming.ours import CONTENDERS as OURS

        contender = OURS[chosen.name]
    serve(contender(chosen.place))


if __name__ == "__main__":
    main()
