"""The studies of flying digits: Tables 1 and 2, Figures 4 and 7.

Deliberately not here: what a study is made of (`design`), the paper's numbers (`published`).
"""

from __future__ import annotations

from collections.abc import Mapping

from tmu_dist.study import published
from tmu_dist.study.design import MSE, ONE_SET_OF_TEACHERS, SSIM, Axis, Claim, Row, Scale, Study

BETAS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
FRACTIONS = (0.25, 0.5, 0.75, 1.0, 2.0)

_SMALL_DIGITS = (
    "Smaller in everything: frames, digits, window, network, sequences, iterations, as the facts "
    "and the data on this page say. The paper: 64x64 pixels, 10 frames in and 10 predicted, four "
    "layers of 64 channels, 10,000 training sequences, 80,000 iterations."
)
NOTES: Mapping[Scale, tuple[str, ...]] = {
    "small": (_SMALL_DIGITS, ONE_SET_OF_TEACHERS),
    "paper": (ONE_SET_OF_TEACHERS,),
}
_METHODS = (
    ("scratch", "from scratch", "none"),
    ("finetune-1", "finetune", "1 digit"),
    ("finetune-2", "finetune", "2 digits"),
    ("tmu", "memory transfer", "both"),
)
"""Rows that several studies have: name of the recipe, label, sources."""


def table_1() -> Study:
    def row(key: str, label: str, sources: str = "none") -> Row:
        return Row(
            key=key,
            label=label,
            sources=sources,
            recipe=f"digits-{key}",
            published=published.TABLE_1[key],
        )

    others = ("finetune-1", "finetune-2", "l2sp-1", "l2sp-2", "knowledge-flow", "art")
    return Study(
        name="table1",
        title="Table 1: flying digits, every method",
        question="Does memory transfer from networks of one and two digits help one of three, and "
        "more than other ways of transfer?",
        scores=(MSE, SSIM),
        rows=(
            row("scratch", "from scratch"),
            row("tmu-scratch", "TMU network from scratch"),
            row("finetune-1", "finetune", "1 digit"),
            row("finetune-2", "finetune", "2 digits"),
            row("l2sp-1", "L2-SP", "1 digit"),
            row("l2sp-2", "L2-SP", "2 digits"),
            row("knowledge-flow", "Knowledge Flow", "both"),
            row("art", "ART", "both"),
            row("tmu-1", "memory transfer", "1 digit"),
            row("tmu-2", "memory transfer", "2 digits"),
            row("tmu", "memory transfer", "both"),
        ),
        claims=(
            Claim(
                key="helps",
                text="Memory transfer from both sources is better than training from scratch.",
                where="Sec. 4.1",
                pairs=(("tmu", "scratch"),),
                scores=(MSE, SSIM),
            ),
            Claim(
                key="beats-others",
                text="Memory transfer from both is better than finetuning, L2-SP, Knowledge Flow "
                "and ART.",
                where="Sec. 4.1, Table 1",
                pairs=tuple(("tmu", other) for other in others),
                scores=(MSE, SSIM),
            ),
            Claim(
                key="knowledge",
                text="It is the transfer that helps and not the architecture: memory transfer is "
                "better than the same network from scratch.",
                where="Sec. 4.1",
                pairs=(("tmu", "tmu-scratch"),),
            ),
            Claim(
                key="parameters",
                text="The TMU network from scratch is no better and no worse than the plain one "
                "(here: by less than 2 %).",
                where="Sec. 4.1, first two rows of Table 1",
                pairs=(("tmu-scratch", "scratch"),),
                alike_within=0.02,
            ),
            Claim(
                key="one-source",
                text="From one source, too, memory transfer is better than finetuning from it.",
                where="Table 1",
                pairs=(("tmu-1", "finetune-1"), ("tmu-2", "finetune-2")),
            ),
            Claim(
                key="two-sources",
                text="Memory transfer from two sources is better than from either one.",
                where="Table 1",
                pairs=(("tmu", "tmu-1"), ("tmu", "tmu-2")),
            ),
        ),
        notes=NOTES,
        costs=published.TABLE_1_COSTS,
    )


def table_2() -> Study:
    names = {"predrnn": "PredRNN", "mim": "MIM"}

    def rows(cell: str) -> tuple[Row, ...]:
        return tuple(
            Row(
                key=f"{cell}/{name}",
                label=f"{names[cell]}, {label}",
                sources=sources,
                recipe=f"digits-{cell}-{name}",
                published=published.TABLE_2[f"{cell}/{name}"],
                group=cell,
            )
            for name, label, sources in _METHODS
        )

    return Study(
        name="table2",
        title="Table 2: flying digits, other backbones",
        question="Does memory transfer help other recurrent networks than ConvLSTM?",
        scores=(MSE, SSIM),
        rows=tuple(row for cell in names for row in rows(cell)),
        claims=tuple(
            Claim(
                key=f"{cell}-{key}",
                text=f"{names[cell]}: {text}",
                where="Sec. 4.1, Table 2",
                pairs=tuple((f"{cell}/tmu", f"{cell}/{other}") for other in others),
                scores=(MSE, SSIM),
            )
            for cell in names
            for key, text, others in (
                ("helps", "memory transfer is better than training from scratch.", ("scratch",)),
                (
                    "beats-finetuning",
                    "memory transfer is better than finetuning from either source.",
                    ("finetune-1", "finetune-2"),
                ),
            )
        ),
        notes=NOTES,
    )


def figure_4() -> Study:
    def key(beta: float) -> str:
        return f"beta-{beta:g}"

    best, robust = 0.1, [beta for beta in BETAS if 1e-3 <= beta <= 1]
    return Study(
        name="figure4",
        title="Figure 4: the weight of the distillation term",
        question="How does beta of Eq. 6 have to be chosen?",
        scores=(MSE, SSIM),
        rows=(
            Row(key="scratch", label="from scratch", recipe="digits-scratch"),
            *(
                Row(
                    key=key(beta),
                    label=f"memory transfer, beta {beta:g}",
                    sources="both",
                    recipe="digits-tmu",
                    settings={"transfer.beta": beta},
                    x=beta,
                )
                for beta in BETAS
            ),
        ),
        claims=(
            Claim(
                key="best",
                text="Beta 0.1 is the best.",
                where="Sec. 4.1, Figure 4",
                pairs=tuple((key(best), key(beta)) for beta in BETAS if beta != best),
            ),
            Claim(
                key="robust",
                text="Any beta from 0.001 to 1 will do (here: each is better than training from "
                "scratch).",
                where="Sec. 4.1, Figure 4",
                pairs=tuple((key(beta), "scratch") for beta in robust),
            ),
        ),
        notes=NOTES,
        axis=Axis(label="beta", is_log=True),
    )


def fraction_rows(fractions: tuple[float, ...]) -> tuple[Row, ...]:
    """Scratch, finetuned and taught students of parts of the target's data."""
    return tuple(
        Row(
            key=f"{name}-{100 * fraction:g}",
            label=f"{label}, {100 * fraction:g} %",
            sources=sources,
            recipe="digits-fractions" if name == "tmu" else f"digits-fractions-{name}",
            settings={"data.fraction": fraction},
            x=100 * fraction,
        )
        for name, label, sources in _METHODS
        for fraction in fractions
    )


def better_at(
    fractions: tuple[float, ...], others: tuple[str, ...], better: str = "tmu"
) -> tuple[tuple[str, str], ...]:
    """Pairs of a claim: memory transfer over others, at each amount of data."""
    return tuple(
        (f"{better}-{100 * fraction:g}", f"{other}-{100 * fraction:g}")
        for fraction in fractions
        for other in others
    )


def figure_7() -> Study:
    finetuned = ("finetune-1", "finetune-2")
    return Study(
        name="figure7",
        title="Figure 7: amounts of target data",
        question="Does memory transfer still help where the target has much data?",
        scores=(MSE, SSIM),
        rows=fraction_rows(FRACTIONS),
        claims=(
            Claim(
                key="beats-scratch",
                text="Memory transfer is better than training from scratch at any amount of data.",
                where="Sec. 4.4, Figure 7",
                pairs=better_at(FRACTIONS, ("scratch",)),
            ),
            Claim(
                key="beats-finetuning",
                text="Memory transfer is better than finetuning at any amount of data.",
                where="Sec. 4.4, Figure 7",
                pairs=better_at(FRACTIONS, finetuned),
            ),
            Claim(
                key="much-data",
                text="With twice the data memory transfer still gains more over scratch than "
                "finetuning does.",
                where="Sec. 4.4",
                pairs=better_at((2.0,), finetuned),
            ),
        ),
        notes=NOTES,
        reference="scratch-100",
        axis=Axis(label="training sequences of the target [%]"),
    )
