"""Differences between methods on the same test images, from their records."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid

from prunevit.benchmarks.intervals import Difference, paired_difference
from prunevit.benchmarks.markdown import markdown_table
from prunevit.benchmarks.records import unpack_answers
from prunevit.extras import needs

with needs("benchmarks"):
    import pandas as pd

DENSE = "dense"  # the method of the dense model's record
OURS = "mappo"


def is_matched(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which records are at their operating point. Those made before 0.2 don't say; learned methods
    were then at most at it, and others at least.
    """
    if "matched" not in rows:
        return pd.Series(True, rows.index)
    return rows["matched"].ne(False)


def answers(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether each record's method was right about each image, bool [S, I]."""
    packed = zip(rows["right"], rows["images"], strict=True)
    return np.stack([unpack_answers(right, int(images)) for right, images in packed])


def difference(first: pd.DataFrame, second: pd.DataFrame, data: pd.DataFrame) -> Difference | None:
    """The accuracy of one method less that of another, each with a record for each seed.

    Args:
        first: records of one point.
        second: those of the other method, at the same point or of the dense model.
        data: all records of the comparison, of which the dense model's knows the images' sources.

    Returns:
        None where one of them has no records that say how each image was answered, or they were
        judged on different images.
    """
    if "right" not in data:
        return None
    both = [rows.dropna(subset=["right"]) for rows in (first, second)]
    sizes = {int(images) for rows in both for images in rows["images"]}
    if any(rows.empty for rows in both) or len(sizes) != 1:
        return None
    images = sizes.pop()
    dense = data[data["method"] == DENSE]
    sources = dense["sources"].iloc[0] if "sources" in dense and len(dense) else None
    if not isinstance(sources, list) or len(sources) != images:
        sources = range(images)  # each is its own
    return paired_difference(answers(both[0]), answers(both[1]), np.asarray(sources))


def differences(methods: Iterable[tuple[str, pd.DataFrame]], data: pd.DataFrame) -> str:
    """Two tables, with a row for each method and a column for each operating point: what a method
    loses against the dense model, and the accuracy of ours less the method's, in percentage points,
    with paired 95% intervals. A difference is bold where its interval excludes zero. A cell says
    how many seeds it has where others of the method have more.

    Args:
        methods: title and records of each.
        data: all records of the comparison, those of ours and of the dense model included.
    """
    methods = [(title, rows[is_matched(rows)]) for title, rows in methods]
    points = sorted({point for _, rows in methods for point in rows["point"]})
    dense = data[data["method"] == DENSE]
    ours = data[(data["method"] == OURS) & is_matched(data)]
    losses, leads = [], []
    for title, rows in methods:
        at = {point: rows[rows["point"] == point] for point in points}
        most = max(map(len, at.values()))
        few = {p: f", {len(at[p])} seeds" if len(at[p]) < most else "" for p in points}
        losses.append([title, *(cell(difference(dense, at[p], data), few[p]) for p in points)])
        if not rows["method"].eq(OURS).all():
            of_ours = {p: ours[ours["point"] == p] for p in points}
            leads.append(
                [title, *(cell(difference(of_ours[p], at[p], data), few[p]) for p in points)]
            )
    columns = [f"at {point:.0%}" for point in points]
    tables = [("loss against dense", losses), ("accuracy of ours less that of", leads)]
    shown = [(title, [line for line in lines if any(line[1:])]) for title, lines in tables]
    return "\n\n".join(markdown_table([title, *columns], lines) for title, lines in shown if lines)


def cell(found: Difference | None, seeds: str = "") -> str:
    """``0.12 [0.03, 0.21]`` in percentage points, bold where the interval excludes zero, and what
    ``seeds`` says of those behind it.
    """
    if found is None:
        return ""
    mean, low, high = (100 * share for share in (found.mean, found.low, found.high))
    text = f"{mean:.2f} [{low:.2f}, {high:.2f}]"
    return (f"**{text}**" if found.is_apart else text) + seeds


def summary(methods: Iterable[tuple[str, pd.DataFrame]]) -> str:
    """A row for each method that reaches the operating points of ours (of all methods, without
    ours): its mean loss against the dense model, which is the area between both curves over the
    range of compute, agreement with the dense model's answers and divergence from them, in means
    over these points.
    """
    methods = [(title, rows[is_matched(rows)]) for title, rows in methods]
    of_ours = [rows for _, rows in methods if rows["method"].eq(OURS).any()]
    points = {point for rows in of_ours or [r for _, r in methods] for point in rows["point"]}
    lines = []
    for title, rows in methods:
        rows = rows[rows["point"].isin(points)]
        if set(rows["point"]) == points and "agreement" in rows:
            means = rows[["agreement", "kl"]].mean()
            lines.append([
                title, f"{100 * mean_loss(rows):.2f}", f"{100 * means['agreement']:.2f}%",
                f"{means['kl']:.4f}",
            ])  # fmt: skip
    if not lines:
        return ""
    span = f"{min(points):.0%} to {max(points):.0%}"
    header = ["method", f"mean loss, {span}", "agreement with dense", "KL from dense, nats"]
    return markdown_table(header, lines)


def mean_loss(rows: pd.DataFrame) -> float:
    """A method's mean loss against the dense model between its lowest and its highest compute: the
    area between both curves, over the width of that range.
    """
    rows = rows.assign(
        loss=rows["dense_accuracy"] - rows["accuracy"], compute=rows["gmacs"] / rows["dense_gmacs"]
    )
    curve = rows.groupby("point")[["compute", "loss"]].mean().sort_values("compute")
    if len(curve) == 1:
        return float(curve["loss"].iloc[0])
    compute, loss = curve["compute"].to_numpy(), curve["loss"].to_numpy()
    return float(trapezoid(loss, compute) / (compute[-1] - compute[0]))


def check_one_origin(rows: pd.DataFrame) -> None:
    """Checks that the records of a table come from one commit and one machine, and speeds from one
    process. Records made before 0.2 don't tell.

    Raises:
        ValueError: they don't.
    """
    if "commit" not in rows:
        return
    origins = sorted({f"{row.commit} on {row.hardware}" for row in rows.itertuples()})
    if len(origins) > 1:
        raise ValueError(f"a table needs records of one commit and machine: {', '.join(origins)}")
    if "timed" in rows and (timed := sorted(rows["timed"].dropna().unique()))[1:]:
        raise ValueError(f"a table needs speeds of one process: these began at {', '.join(timed)}")
