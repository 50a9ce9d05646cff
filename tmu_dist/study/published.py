"""What the tables of the paper say (Yao et al., ICML 2020), by row. Data only.

Errors are per frame: MSE and MAE are sums over channels and pixels, SSIM a mean. Figures 4 and 7
have no numbers in the text, and none are read off them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Values: TypeAlias = Mapping[str, Mapping[str, float]]
"""By row, then by score."""


def _values(columns: tuple[str, ...], rows: Mapping[str, tuple[float, ...]]) -> Values:
    return {key: dict(zip(columns, numbers, strict=True)) for key, numbers in rows.items()}


_ERRORS = ("mse_per_frame", "ssim")

TABLE_1 = _values(
    _ERRORS,
    {
        "scratch": (120.5, 0.712),
        "tmu-scratch": (120.6, 0.715),
        "finetune-1": (114.8, 0.720),
        "finetune-2": (110.0, 0.732),
        "l2sp-1": (118.5, 0.703),
        "l2sp-2": (116.4, 0.705),
        "knowledge-flow": (107.2, 0.748),
        "art": (105.0, 0.734),
        "tmu-1": (96.1, 0.762),
        "tmu-2": (97.3, 0.756),
        "tmu": (94.7, 0.777),
    },
)
"""Flying digits, target 3 digits, ConvLSTM."""

TABLE_1_COSTS = _values(
    ("parameters_train", "parameters_test", "seconds_per_batch", "ms_per_sequence"),
    {
        "scratch": (3.0e6, 3.0e6, 0.35, 16.3),
        "finetune-1": (3.0e6, 3.0e6, 0.35, 16.3),
        "l2sp-1": (3.0e6, 3.0e6, 0.39, 16.3),
        "knowledge-flow": (10.1e6, 4.1e6, 0.54, 21.7),
        "art": (10.1e6, 10.1e6, 0.73, 25.3),
        "tmu": (9.5e6, 3.6e6, 0.43, 17.7),
    },
)
"""The same table's other half, on a TITAN RTX."""

TABLE_2 = _values(
    _ERRORS,
    {
        "predrnn/scratch": (93.4, 0.802),
        "predrnn/finetune-1": (91.1, 0.811),
        "predrnn/finetune-2": (89.4, 0.816),
        "predrnn/tmu": (84.9, 0.828),
        "mim/scratch": (89.0, 0.783),
        "mim/finetune-1": (84.5, 0.794),
        "mim/finetune-2": (83.2, 0.801),
        "mim/tmu": (75.3, 0.838),
    },
)
"""The same target, other backbones."""

TABLE_3 = _values(
    _ERRORS,
    {
        "convlstm/scratch": (504.2, 0.762),
        "convlstm/finetune-kth": (472.0, 0.778),
        "convlstm/finetune-weizmann": (476.4, 0.774),
        "convlstm/tmu": (442.5, 0.794),
        "mim/scratch": (430.5, 0.790),
        "mim/finetune-kth": (420.1, 0.796),
        "mim/finetune-weizmann": (422.9, 0.793),
        "mim/tmu": (394.2, 0.813),
        "savp/scratch": (465.2, 0.792),
        "savp/finetune-kth": (453.7, 0.808),
        "savp/finetune-weizmann": (458.1, 0.805),
        "savp/tmu": (430.2, 0.831),
    },
)
"""Target Human3.6M; of SAVP the best of 100 samples by SSIM."""

TABLE_3_TEXT = _values(("ssim",), {"convlstm/tmu-kth": (0.790,)})
"""Sec. 4.4 has it from Table 3, which has no such row."""

TABLE_4 = _values(
    ("mse_per_frame", "mae_per_frame", "csi"),
    {
        "scratch": (110.5, 219.9, 0.348),
        "finetune-2014": (96.6, 198.3, 0.368),
        "finetune-2016": (94.9, 197.3, 0.375),
        "tmu-mnist2-kth": (91.8, 192.8, 0.382),
        "tmu-2014": (87.4, 193.3, 0.374),
        "tmu-2016": (84.7, 191.6, 0.384),
        "tmu-both": (77.3, 184.2, 0.403),
        "tmu-all": (77.1, 181.3, 0.408),
    },
)
"""Target radar of Beijing, sources radar of Guangzhou in 2014 and 2016; CSI at 20 dBZ."""

TABLE_5 = _values(
    ("gate",),
    {"2014": (0.60,), "2016": (0.61,), "mnist2": (0.43,), "kth": (0.39,)},
)
"""Mean transfer gates of the last row of Table 4."""

TABLE_6 = _values(
    ("ssim",),
    {"scratch": (0.771,), "tmu-human": (0.774,), "tmu-mnist2": (0.808,)},
)
"""Target KTH."""
