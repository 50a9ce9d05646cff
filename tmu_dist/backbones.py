"""The registry of backbones: every name that `model.cell` may have, and the class behind it.

A name stands for a recurrent cell (`models.cells.base.RecurrentCell`), of which a stacked network
is built, or for a whole network (`models.rollout.Predictor`). Classes are named and not imported,
so that settings can be checked without torch.
"""

from __future__ import annotations

BACKBONES = {
    "convlstm": "tmu_dist.models.cells.convlstm:ConvLSTMCell",
    "predrnn": "tmu_dist.models.cells.st_lstm:STLSTMCell",
    "mim": "tmu_dist.models.cells.mim:MIMCell",
    "e3d_lstm": "tmu_dist.models.cells.e3d_lstm:E3DLSTMCell",
    "e3d_openstl": "tmu_dist.models.cells.e3d_openstl:OpenSTLE3DCell",
    "savp": "tmu_dist.models.savp.network:SAVP",
    "vpn": "tmu_dist.models.vpn.network:VideoPixelNetwork",
}
