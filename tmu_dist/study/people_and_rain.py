"""The studies of people and of rain: Tables 3 to 6.

Deliberately not here: what a study is made of (`design`), the paper's numbers (`published`), where
original files lie (`tmu_dist.recipes.originals`).
"""

from __future__ import annotations

from collections.abc import Mapping

from tmu_dist.study import published
from tmu_dist.study.design import (
    CSI,
    GATE,
    MAE,
    MSE,
    ONE_SET_OF_TEACHERS,
    SSIM,
    Claim,
    Row,
    Scale,
    Study,
)

_SMALL_PEOPLE = (
    "Smaller in everything: frames, network, iterations, as the facts and the data on this page "
    "say. The paper: 128x128 pixels, four layers of 64 channels, 80,000 iterations. Every third "
    "frame of KTH and of other clips is taken: people move more between frames."
)
_KTH_SPLIT = (
    "Of a part of KTH that lacks persons who usually validate or test, the last repetition in each "
    "clip tests and the one before validates: persons and scenes of the tests were seen in "
    "training."
)
_RADAR_DATA = (
    "The paper's radar data are not public. MeteoSwiss stands for Guangzhou 2016, FMI for "
    "Guangzhou 2014 and KNMI for Beijing: one scale, 0 to 70 dBZ every five minutes. The target is "
    "one night; its test sequences overlap in time and space, so intervals over them are too "
    "narrow."
)
_RADAR_SMALL = (
    "Smaller in everything: tiles, window, network, iterations, as the facts and the data on this "
    "page say. The paper: 256x256 pixels, 10 frames in and 10 predicted, four layers of 64 "
    "channels, 80,000 iterations."
)
_OTHER_TEACHERS = (
    "Teachers of two digits and of KTH see the radar frames in the size of their own, in patches "
    "that make the same maps; they are trained with the filters of the radar networks."
)
_TABLE_6_PROTOCOL = (
    "The paper gives only SSIM and no protocol of KTH as a target: here grey frames, as many in as "
    "predicted."
)
_SAVP = (
    "The paper says nothing of how SAVP was trained: here with its own losses and rates, and for "
    "as many iterations as the facts on this page say."
)


def table_3() -> Study:
    names = {"convlstm": "ConvLSTM", "mim": "MIM", "savp": "SAVP"}

    def row(cell: str, name: str, label: str, sources: str) -> Row:
        key = f"{cell}/{name}"
        family = "human" if cell == "convlstm" else f"human-{cell}"
        return Row(
            key=key,
            label=f"{names[cell]}, {label}",
            sources=sources,
            recipe=f"{family}-{name}",
            published=published.TABLE_3.get(key) or published.TABLE_3_TEXT[key],
            group=cell,
        )

    def rows(cell: str) -> tuple[Row, ...]:
        only_in_the_text = (
            (row(cell, "tmu-kth", "memory transfer", "KTH"),) if cell == "convlstm" else ()
        )
        return (
            row(cell, "scratch", "from scratch", "none"),
            row(cell, "finetune-kth", "finetune", "KTH"),
            row(cell, "finetune-weizmann", "finetune", "Weizmann"),
            *only_in_the_text,
            row(cell, "tmu", "memory transfer", "both"),
        )

    def claims(cell: str) -> tuple[Claim, ...]:
        finetuned = (f"{cell}/finetune-kth", f"{cell}/finetune-weizmann")
        return (
            Claim(
                key=f"{cell}-helps",
                text=f"{names[cell]}: memory transfer from both is better than training from "
                "scratch.",
                where="Table 3",
                pairs=((f"{cell}/tmu", f"{cell}/scratch"),),
                scores=(MSE, SSIM),
            ),
            Claim(
                key=f"{cell}-beats-finetuning",
                text=f"{names[cell]}: memory transfer is better than finetuning from either "
                "source.",
                where="Sec. 4.2, Table 3",
                pairs=tuple((f"{cell}/tmu", other) for other in finetuned),
                scores=(MSE, SSIM),
            ),
        )

    one_source = Claim(
        key="one-source",
        text="ConvLSTM: from KTH alone, memory transfer is better than finetuning, and than "
        "training from scratch.",
        where="Sec. 4.2 and 4.4",
        pairs=(("convlstm/tmu-kth", "convlstm/finetune-kth"), ("convlstm/tmu-kth",
               "convlstm/scratch")),
        scores=(SSIM,),
    )  # fmt: skip
    return Study(
        name="table3",
        title="Table 3: human motion",
        question="Does memory transfer from plain scenes (KTH, Weizmann) help on Human3.6M?",
        scores=(MSE, SSIM),
        rows=tuple(row for cell in names for row in rows(cell)),
        claims=(*(claim for cell in names for claim in claims(cell)), one_source),
        notes={
            "small": (_SMALL_PEOPLE, _KTH_SPLIT, _SAVP, ONE_SET_OF_TEACHERS),
            "paper": (_SAVP, ONE_SET_OF_TEACHERS),
        },
        samples={"paper": 100},
    )


def radar_notes(*others: str) -> Mapping[Scale, tuple[str, ...]]:
    """In what a study of rain is not the paper's experiment; others: what only this one is not."""
    return {
        "small": (_RADAR_DATA, _RADAR_SMALL, *others, ONE_SET_OF_TEACHERS),
        "paper": (_RADAR_DATA, *others, ONE_SET_OF_TEACHERS),
    }


def _radar_row(key: str, label: str, sources: str, paper: str) -> Row:
    return Row(
        key=key,
        label=label,
        sources=sources,
        recipe=f"radar-{key}",
        published=published.TABLE_4[paper],
    )


def table_4() -> Study:
    finetuned = ("finetune-fmi", "finetune-mch")
    return Study(
        name="table4",
        title="Table 4: radar, sources within and across benchmarks",
        question="Which sources help to forecast rain where there is little to learn from?",
        scores=(MSE, MAE, CSI),
        rows=(
            _radar_row("scratch", "from scratch", "none", "scratch"),
            _radar_row("finetune-fmi", "finetune", "FMI", "finetune-2014"),
            _radar_row("finetune-mch", "finetune", "MeteoSwiss", "finetune-2016"),
            _radar_row("tmu-mnist2-kth", "memory transfer", "2 digits, KTH",
                       "tmu-mnist2-kth"),
            _radar_row("tmu-fmi", "memory transfer", "FMI", "tmu-2014"),
            _radar_row("tmu-mch", "memory transfer", "MeteoSwiss", "tmu-2016"),
            _radar_row("tmu", "memory transfer", "both radars", "tmu-both"),
            _radar_row("tmu-all", "memory transfer", "both radars, 2 digits, KTH",
                       "tmu-all"),
        ),
        claims=(
            Claim(
                key="helps",
                text="Memory transfer from two radar data sets is better than training from "
                "scratch.",
                where="Sec. 4.3, Table 4",
                pairs=(("tmu", "scratch"),),
                scores=(MSE, MAE, CSI),
            ),
            Claim(
                key="beats-finetuning",
                text="Memory transfer from two radar data sets is better than finetuning from "
                "either, in all scores.",
                where="Sec. 4.3",
                pairs=tuple(("tmu", other) for other in finetuned),
                scores=(MSE, MAE, CSI),
            ),
            Claim(
                key="same-source",
                text="Memory transfer from one radar data set has less error than finetuning from "
                "the same.",
                where="Table 4",
                pairs=(("tmu-fmi", "finetune-fmi"), ("tmu-mch", "finetune-mch")),
            ),
            Claim(
                key="irrelevant",
                text="Even digits and walking people are better teachers of rain than none.",
                where="Sec. 4.4",
                pairs=(("tmu-mnist2-kth", "scratch"),),
                scores=(MSE, MAE, CSI),
            ),
            Claim(
                key="no-negative-transfer",
                text="Digits and walking people beside both radar data sets help further.",
                where="Sec. 4.4",
                pairs=(("tmu-all", "tmu"),),
                scores=(MSE, MAE, CSI),
            ),
        ),
        notes=radar_notes(_OTHER_TEACHERS, _KTH_SPLIT),
    )  # fmt: skip


def table_5() -> Study:
    sources = {
        "fmi": ("FMI", "2014"),
        "mch": ("MeteoSwiss", "2016"),
        "mnist2": ("2 digits", "mnist2"),
        "kth": ("KTH", "kth"),
    }
    return Study(
        name="table5",
        title="Table 5: transfer gates on radar",
        question="Are the gates of relevant sources more open?",
        scores=(GATE,),
        rows=tuple(
            Row(
                key=source,
                label=label,
                sources="all four",
                recipe="radar-tmu-all",
                published=published.TABLE_5[theirs],
                gate_of=source,
            )
            for source, (label, theirs) in sources.items()
        ),
        claims=(
            Claim(
                key="relevance",
                text="Gates of the radar sources are more open than those of digits and people.",
                where="Sec. 4.4, Table 5",
                pairs=tuple((near, far) for near in ("fmi", "mch") for far in ("mnist2", "kth")),
            ),
        ),
        notes=radar_notes(_OTHER_TEACHERS, _KTH_SPLIT),
        reference="",
    )


def table_6() -> Study:
    def row(key: str, label: str, sources: str) -> Row:
        return Row(
            key=key,
            label=label,
            sources=sources,
            recipe=f"kth-{key}",
            published=published.TABLE_6[key],
        )

    return Study(
        name="table6",
        title="Table 6: KTH as the target",
        question="Which source helps KTH: people in complex scenes, or digits that move as they "
        "must?",
        scores=(SSIM, MSE),
        rows=(
            row("scratch", "from scratch", "none"),
            row("tmu-human", "memory transfer", "Human3.6M"),
            row("tmu-mnist2", "memory transfer", "2 digits"),
        ),
        claims=(
            Claim(
                key="digits-help",
                text="Memory transfer from two flying digits helps on KTH.",
                where="Sec. 4.4, Table 6",
                pairs=(("tmu-mnist2", "scratch"),),
            ),
            Claim(
                key="determinism",
                text="Two flying digits help more on KTH than Human3.6M does: a source without "
                "uncertainty is the better one.",
                where="Sec. 4.4, Table 6",
                pairs=(("tmu-mnist2", "tmu-human"),),
            ),
        ),
        notes={
            "small": (_SMALL_PEOPLE, _TABLE_6_PROTOCOL, _KTH_SPLIT, ONE_SET_OF_TEACHERS),
            "paper": (_TABLE_6_PROTOCOL, _KTH_SPLIT, ONE_SET_OF_TEACHERS),
        },
    )
