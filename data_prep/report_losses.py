"""What an archive does not hold, and why; what is odd about the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.report_html import absent, number_text, section, table
from tmu_dist.html_page import Html, bullet_list, element

_MOST_ROWS = 50
_REASONS = {
    "duplicates": "another frame of the same time",
    "nothing_observed": "nothing was observed in them",
    "near_another_split": "too close in time to another split",
    "in_no_sequence": "in no complete sequence",
    "in_no_split": "in no split",
    "too_little_observed": "too little was observed",
    "too_dry": "too little rain (filter)",
}


def loss_parts(report: Mapping[str, Any]) -> list[Html]:
    """Frames, sequences and files that are not in the archive, by reason; findings on quality."""
    heading = element("h2", "What was left out")
    if not report:
        return [heading, absent("Losses", "the archive has no report.json")]
    plan = section(report, "plan")
    rows = []
    for what in ("frames", "sequences"):
        counts = section(plan, what)
        for reason, number in section(counts, "left_out").items():
            if number:
                words = _REASONS.get(reason, reason.replace("_", " "))
                rows.append([what.capitalize(), words, number_text(number)])
    parts = [heading]
    if used := section(plan, "frames").get("used"):
        found = section(plan, "frames").get("found")
        parts.append(
            element("p", f"{number_text(used)} of {number_text(found)} frames are in sequences.")
        )
    if dry := section(plan, "sequences").get("dry_written"):
        text = "dry sequences were kept by chance; their weights say how many each stands for."
        parts.append(element("p", f"{number_text(dry)} {text}"))
    if rows:
        parts.append(table(["", "Reason", "Number"], rows, words=2))
    else:
        parts.append(element("p", "No frame or sequence was left out."))
    for name, title in (("bad_files", "Bad files"), ("left_out_files", "Files left out")):
        parts += _files(section(report, name), title)
    clips = section(report, "facts", "left_out_clips")
    for reason in clips:
        number, first = (section(clips, reason).get(name) for name in ("number", "first"))
        parts.append(
            element("p", f"Clips left out: {number_text(number)}, {reason} (first: {first}).")
        )
    return [*parts, *_quality(section(plan, "quality")), *_shared_pictures(plan)]


def _files(files: Mapping[str, Any], title: str) -> list[Html]:
    """A table of files with the reason why each is not in the archive."""
    rows = [
        [str(row.get("file", "")), str(row.get("reason", ""))] for row in files.get("list") or []
    ]
    if not rows:
        return [element("p", f"{title}: none.")]
    shown = table(["File", "Reason"], rows[:_MOST_ROWS], words=2)
    number = files.get("number", len(rows))
    parts = [element("h3", f"{title}: {number:,}"), shown]
    if number > _MOST_ROWS:
        more = f"And {number - _MOST_ROWS:,} more; up to 1,000 are listed in report.json."
        parts.append(element("p", more, css="small"))
    return parts


def _quality(quality: Mapping[str, Any]) -> list[Html]:
    """Findings of the quality checks, in sentences."""
    sentences = []
    gaps, frozen = section(quality, "gaps"), section(quality, "frozen")
    above, duplicates = section(quality, "above_range"), section(quality, "duplicates")
    if number := gaps.get("number"):
        missing = number_text(gaps.get("missing_frames"))
        sentences.append(f"Gaps: {number_text(number)}, with {missing} frames missing.")
    if number := frozen.get("stretches"):
        frames = number_text(frozen.get("frames"))
        sentences.append(
            f"Stretches in which the picture stands still: {number_text(number)}, {frames} frames."
        )
    if number := above.get("pixels"):
        frames = number_text(above.get("frames"))
        text = f"Pixels above the stored range, clipped to its end: {number_text(number)}"
        sentences.append(f"{text} (in {frames} frames).")
    if number := duplicates.get("different"):
        sentences.append(f"Files that contradict another of the same time: {number_text(number)}.")
    for row in quality.get("intervals") or []:
        if row.get("differs_from_declared"):
            name = row.get("series") or "The frames"
            found, declared = row.get("common_minutes"), row.get("interval_minutes")
            sentences.append(f"{name}: every {found:g} minutes, not {declared:g} as declared.")
    if not quality:
        return []
    if not sentences:
        text = "No gaps, no frozen pictures, nothing above the stored range, no contradictions."
        return [element("h3", "Quality"), element("p", text)]
    return [element("h3", "Quality"), bullet_list(sentences)]


def _shared_pictures(plan: Mapping[str, Any]) -> list[Html]:
    shared = section(plan, "pictures_in_two_splits")
    return [
        element("p", f"{pair} have {number_text(number)} pictures in common.")
        for pair, number in shared.items()
    ]
