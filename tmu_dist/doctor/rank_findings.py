"""What follows from what the ranks of a run saw (rank_facts.py): findings, by pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from tmu_dist.doctor.findings import Finding
from tmu_dist.doctor.rank_facts import LoaderFacts, Part, RankFacts, RanksSeen, StepFacts

_EXCHANGE_SHARE = 0.5
"""Of a step, from which on the exchange of gradients is too slow; it runs beside the backward pass,
which is about half of a step."""
_LINK_SHARE = 0.5
_WAIT_SHARE = 0.1
_FULL = 0.9
_SLOW, _NOISE_SECONDS = 1.5, 0.02
"""Times the time of the median rank; and what is no difference in any case."""

_ADVICE: dict[Part, str] = {
    "exchange": (
        "Let the nodes reach each other on all ports (firewall, security group), and name the "
        "network interface between them where `ray start` runs: GLOO_SOCKET_IFNAME (CPUs, and "
        "what ranks tell each other) and NCCL_SOCKET_IFNAME (GPUs), such as eth0."
    ),
    "loader": (
        "Make the archive of data.url (and data.mix_with) readable from every node and whole: "
        "`python -m data_prep verify URL` names what is missing or damaged."
    ),
    "teachers": (
        "Name trained runs in transfer.teachers that every node can read and that fit the "
        "student; for memory choose placement.kind=placed or sharded, placement.precision=bf16, "
        "or a larger placement.memory_gib."
    ),
    "step": "Change what the message names: training would end in the same way.",
}
_LESS_MEMORY = (
    "Train fewer sequences at once (scale.sequences_at_once), in training.precision=bf16, or with "
    "teachers spread over the ranks (placement.kind=placed or sharded)."
)


def judge_ranks(seen: RanksSeen) -> list[Finding]:
    """At least one finding for each part of a look."""
    if not seen.ranks:
        text = f"No rank was started: {seen.error or 'the reason is unknown.'}"
        return [Finding(check="step", status="fault", found=text, advice=_ADVICE["step"])]
    judges: dict[Part, Callable[[Sequence[RankFacts]], list[Finding]]] = {
        "exchange": _judge_exchange,
        "loader": _judge_loader,
        "teachers": _judge_teachers,
        "step": _judge_step,
    }
    findings = []
    for part, judge in judges.items():
        if not (found := _failed(part, seen) or _lost(part, seen)):
            is_known = all(getattr(rank, part) is not None for rank in seen.ranks)
            found = judge(seen.ranks) if is_known else [_skipped(part, seen.ranks)]
        findings += found
    if seen.error and all(finding.status != "fault" for finding in findings):
        text = f"All ranks came to their end, but then: {seen.error}"
        findings.append(Finding(check="step", status="fault", found=text, advice=_ADVICE["step"]))
    return findings


def _failed(part: Part, seen: RanksSeen) -> list[Finding]:
    """One for every error that is not only what others met because of it."""
    failed = [rank for rank in seen.ranks if part in rank.failures]
    blamed = [rank for rank in failed if not rank.failures[part].may_follow] or failed
    by_text: dict[str, list[RankFacts]] = {}
    for rank in blamed:
        by_text.setdefault(rank.failures[part].text, []).append(rank)
    findings = []
    for text, ranks in by_text.items():
        is_of_memory = ranks[0].failures[part].kind in ("OutOfMemoryError", "MemoryError")
        findings.append(
            Finding(
                check=part,
                status="fault",
                where=_where(ranks, seen.ranks),
                found=f"{_over(ranks) if part == 'exchange' else ''}{text}",
                advice=_LESS_MEMORY if is_of_memory else _ADVICE[part],
            )
        )
    return findings


def _lost(part: Part, seen: RanksSeen) -> list[Finding]:
    """Of ranks from which nothing was heard after they had begun with a part."""
    lost = [rank for rank in seen.ranks if rank.part == part]
    if not lost:
        return []
    found = seen.error or "no error was told."
    if part == "exchange":
        found = f"{_over(lost)}no connection between the ranks: {found}"
    return [
        Finding(
            check=part,
            status="fault",
            where=_where(lost, seen.ranks),
            found=found,
            advice=_ADVICE[part],
        )
    ]


def _skipped(part: Part, ranks: Sequence[RankFacts]) -> Finding:
    failed = {name for rank in ranks for name in rank.failures}
    if part == "exchange" and len(ranks) == 1:
        why = "one rank exchanges nothing"
    elif part == "teachers" and ("step" in failed or all(rank.step for rank in ranks)):
        why = "no teacher runs beside the student"
    else:
        why = (
            f"not reached: {', '.join(sorted(failed))} failed"
            if failed
            else "needs the archive and the teachers"
        )
    return Finding(check=part, status="skipped", found=why)


def _judge_exchange(ranks: Sequence[RankFacts]) -> list[Finding]:
    facts = [rank.exchange for rank in ranks if rank.exchange is not None]
    slowest = min(facts, key=lambda each: each.bytes_per_second)
    latency = max(each.latency_seconds for each in facts)
    found = (
        f"{len(ranks)} ranks on {_nodes(ranks)}, {slowest.backend}{_named(ranks)}: "
        f"{_duration(latency)} for a few bytes, {_size(slowest.bytes_per_second)}/s"
    )
    advice = ""
    share = max(_exchange_share(rank) for rank in ranks)
    if share > _EXCHANGE_SHARE:
        found += f"; exchanging gradients takes {share:.0%} of a step's time"
        advice = (
            "Put the ranks on fewer nodes or a faster network, name its interface "
            "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), or learn more in a step: a larger "
            "training.batch_size, or training.reverse_input=average (one exchange a step)."
        )
    link = min((rank.link_bits_per_second or math.inf for rank in ranks), default=math.inf)
    over_network = slowest.backend == "nccl" and len({rank.node for rank in ranks}) > 1
    if over_network and 8 * slowest.bytes_per_second < _LINK_SHARE * link < math.inf:
        found += f"; the interface could carry {_size(link / 8)}/s"
        advice = advice or (
            "Look whether NCCL uses the network that is meant (NCCL_DEBUG=INFO says which), "
            "and whether others use it, too."
        )
    numbers = {"latency_seconds": latency, "bytes_per_second": slowest.bytes_per_second}
    return [
        Finding(
            check="exchange",
            status="warning" if advice else "ok",
            found=found,
            advice=advice,
            numbers=numbers,
        )
    ]


def _exchange_share(rank: RankFacts) -> float:
    """Of a step, if nothing else went on beside the exchange of its gradients."""
    if rank.step is None or rank.exchange is None:
        return 0.0
    sent = 2 * (rank.world_size - 1) / rank.world_size * rank.step.gradient_bytes
    return rank.step.exchanges * sent / rank.exchange.bytes_per_second / rank.step.seconds


def _judge_teachers(ranks: Sequence[RankFacts]) -> list[Finding]:
    fullest = max(ranks, key=lambda rank: rank.teachers.held_bytes if rank.teachers else 0)
    facts = fullest.teachers
    assert facts is not None
    others = {
        kind: max(rank.teachers.predicted_bytes[kind] for rank in ranks if rank.teachers)
        for kind in facts.predicted_bytes
    }
    predicted = others.pop(facts.kind)
    found = (
        f"{facts.count} teacher{'s' * (facts.count > 1)}, {facts.kind}: "
        f"{_size(facts.held_bytes)} of weights on the fullest rank, predicted {_size(predicted)}"
    )
    if others:
        found += f" ({', '.join(f'{kind} {_size(each)}' for kind, each in others.items())})"
    numbers = {
        "held_bytes": float(facts.held_bytes),
        "predicted_bytes": float(predicted),
        **{f"predicted_bytes_{kind}": float(each) for kind, each in others.items()},
    }
    if facts.held_bytes <= predicted:
        return [Finding(check="teachers", status="ok", found=found, numbers=numbers)]
    return [
        Finding(
            check="teachers",
            status="warning",
            where=_where([fullest], ranks),
            found=found,
            advice="Leave more room than predicted: lower placement.memory_gib, or choose "
            "placement.kind=placed or sharded. Please report it.",
            numbers=numbers,
        )
    ]


def _judge_step(ranks: Sequence[RankFacts]) -> list[Finding]:
    wrong = [rank for rank in ranks if not all(map(math.isfinite, _step(rank).losses))]
    slowest = max(ranks, key=lambda rank: _step(rank).seconds)
    facts = _step(slowest)
    if wrong:
        losses = _step(wrong[0]).losses
        number = next(n for n, loss in enumerate(losses, start=1) if not math.isfinite(loss))
        return [
            Finding(
                check="step",
                status="fault",
                where=_where(wrong, ranks),
                found=f"the loss is {losses[number - 1]} at step {number}",
                advice="Choose training.grad_clip_norm=1.0, a smaller training.learning_rate, or, "
                "with model.cell=predrnn or mim on frames that can be empty, model.bias=true.",
            )
        ]
    losses_told = " ".join(f"{loss:.4g}" for loss in facts.losses)
    done = Finding(
        check="step",
        status="ok",
        found=f"{_duration(facts.seconds)} on {_nodes(ranks)} (the first one "
        f"{_duration(facts.first_seconds)}), loss {losses_told}",
        numbers={"seconds": facts.seconds, "first_seconds": facts.first_seconds},
    )
    return [done, _judge_memory(ranks), *_judge_slow(ranks)]


def _judge_memory(ranks: Sequence[RankFacts]) -> Finding:
    """Of a GPU by rank; of CPUs by node, which its ranks share."""
    by_place: dict[str, list[RankFacts]] = {}
    for rank in ranks:
        place = f"{rank.node} {rank.rank if rank.device != 'cpu' else ''}"
        by_place.setdefault(place, []).append(rank)
    members = max(by_place.values(), key=_fullness)
    peak, predicted, total = _memory(members)
    found = f"at most {_size(peak)} of {_size(total)} memory were taken ({members[0].device})"
    heaviest = max(members, key=lambda rank: _step(rank).taken_bytes or 0)
    taken = _step(heaviest).taken_bytes
    found += f"; {_size(_step(heaviest).predicted_bytes)} are predicted for a rank's run"
    if taken is not None:
        found += f", {_size(taken)} came with these steps"
    is_full = _fullness(members) > _FULL
    return Finding(
        check="step",
        status="warning" if is_full else "ok",
        where=_where(members, ranks),
        found=found,
        advice=_LESS_MEMORY if is_full else "",
        numbers={
            "peak_bytes": peak,
            "predicted_bytes": predicted,
            "total_bytes": total,
            **({} if taken is None else {"taken_bytes": float(taken)}),
        },
    )


def _memory(members: Sequence[RankFacts]) -> tuple[float, float, float]:
    """Bytes that ranks of one place took at most, that are predicted for them, and that it has."""
    facts = [_step(rank) for rank in members]
    return (
        float(sum(each.peak_bytes for each in facts)),
        float(sum(each.predicted_bytes for each in facts)),
        float(facts[0].total_bytes),
    )


def _fullness(members: Sequence[RankFacts]) -> float:
    """Part of the memory of a place that is taken, or will be."""
    peak, predicted, total = _memory(members)
    return max(peak, predicted) / total if total else 0.0


def _judge_slow(ranks: Sequence[RankFacts]) -> list[Finding]:
    usual = statistics.median_low(_step(rank).forward_seconds for rank in ranks)
    least = max(_SLOW * usual, usual + _NOISE_SECONDS)
    return [
        Finding(
            check="step",
            status="warning",
            where=_where([rank], ranks),
            found=f"a forward pass takes {_duration(_step(rank).forward_seconds)}, "
            f"{_step(rank).forward_seconds / usual:.1f} times as long as on other ranks, and all "
            "ranks wait for the slowest",
            advice="Look what else runs on that node and whether its device is throttled or of "
            "another kind; leave the node out if it stays slow.",
            numbers={"forward_seconds": _step(rank).forward_seconds, "usual_seconds": usual},
        )
        for rank in ranks
        if _step(rank).forward_seconds > least
    ]


def _judge_loader(ranks: Sequence[RankFacts]) -> list[Finding]:
    facts = [rank.loader for rank in ranks if rank.loader is not None]
    slowest = max(facts, key=lambda each: each.seconds_per_batch)
    rate = sum(each.sequences for each in facts) / slowest.seconds_per_batch
    processes = f"{slowest.processes or 'no'} reading process{'es' * (slowest.processes != 1)}"
    found = (
        f"{rate:,.0f} sequences/s with {processes} a rank, the first ones after "
        f"{_duration(max(each.first_seconds for each in facts))}"
    )
    numbers = {"sequences_per_second": rate}
    if any(rank.step is None for rank in ranks):
        return [Finding(check="loader", status="ok", found=found, numbers=numbers)]
    waiting = {rank.rank: _wait_share(rank.loader, _step(rank)) for rank in ranks if rank.loader}
    share = max(waiting.values())
    learned = sum(each.sequences for each in facts) / max(_step(rank).seconds for rank in ranks)
    found += f"; steps take {learned:,.0f}/s, so {share:.0%} of the time is waiting for data"
    numbers |= {"learned_per_second": learned, "wait_share": share}
    late = [rank for rank in ranks if waiting[rank.rank] > _WAIT_SHARE]
    if not late:
        return [Finding(check="loader", status="ok", found=found, numbers=numbers)]
    return [
        Finding(
            check="loader",
            status="warning",
            where=_where(late, ranks),
            found=found,
            advice=f"Read with more processes (data.num_workers={2 * slowest.processes or 2}), "
            "from a store nearer to the nodes, or through a cache on a faster disk "
            "(TMU_DIST_CACHE).",
            numbers=numbers,
        )
    ]


def _wait_share(loader: LoaderFacts, step: StepFacts) -> float:
    """Of the time, that a rank waits for data: processes read beside its steps, it itself between
    them."""
    if loader.processes == 0:
        return loader.seconds_per_batch / (loader.seconds_per_batch + step.seconds)
    return max(0.0, 1 - step.seconds / loader.seconds_per_batch)


def _step(rank: RankFacts) -> StepFacts:
    assert rank.step is not None
    return rank.step


def _where(ranks: Sequence[RankFacts], everyone: Sequence[RankFacts]) -> str:
    """`rank 3 on 10.0.0.2`; nothing if it is all of them."""
    if len(ranks) == len(everyone):
        return ""
    numbers = ", ".join(str(rank.rank) for rank in ranks)
    return f"rank{'s' * (len(ranks) > 1)} {numbers} on {', '.join(_different(ranks))}"


def _nodes(ranks: Sequence[RankFacts]) -> str:
    return ", ".join(_different(ranks))


def _different(ranks: Iterable[RankFacts]) -> list[str]:
    return list(dict.fromkeys(rank.node for rank in ranks))


def _named(ranks: Sequence[RankFacts]) -> str:
    """Over which interfaces, if they are known by name."""
    names = sorted({rank.interface for rank in ranks if rank.interface})
    return f" over {', '.join(names)}" if names else ""


def _over(ranks: Sequence[RankFacts]) -> str:
    """Who, where, and over what: for errors between ranks."""
    if ranks[0].world_size == 1:
        return ""
    numbers = ", ".join(str(rank.rank) for rank in ranks)
    return f"rank{'s' * (len(ranks) > 1)} {numbers} on {_nodes(ranks)}{_named(ranks)}: "


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.3g} {name}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
