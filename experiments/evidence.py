"""The tables, the plots and the figures of `experiments.adapt`."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from experiments.forgetting import Course
from experiments.retrieving import Scored
from ruvjax.training import report
from ruvjax.training.evaluate import Interval, ratio
from ruvjax.training.plots import share_curve
from ruvjax.training.runfolder import RunFolder

Courses = dict[str, list[Course]]


@dataclass(frozen=True)
class Record:
    """One arm of one seed on the held-out text of all domains. banks, distractors: 0 where they have no meaning."""

    arm: str
    seed: int
    bits_per_byte: float
    perplexity: float
    banks: int = 0
    distractors: int = 0

    @property
    def name(self) -> str:
        banks = f", {self.banks} bank{'s' * (self.banks != 1)}" if self.banks else ""
        return f"{self.arm}{banks}" + (f", {self.distractors:,} distractors" if self.distractors else "")

    def line(self) -> str:
        return f"{self.name}: {self.bits_per_byte:.4f} bits per byte"


def record(arm: str, seed: int, scored: Scored, *, banks: int = 0, distractors: int = 0) -> Record:
    return Record(arm, seed, scored.bits_per_byte, scored.perplexity, banks, distractors)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean with a 95% interval (Student t over seeds)."""
    return ratio(np.asarray(values, np.float64), np.ones(len(values)))


def gains(records: Sequence[Record], name: str) -> Interval:
    """By how much less than the base an arm needs, as a share of the base's bits per byte, paired by seed."""
    base = {r.seed: r.bits_per_byte for r in records if r.arm == "base"}
    return over_seeds([1 - r.bits_per_byte / base[r.seed] for r in records if r.name == name])


def kept(records: Sequence[Record], name: str, oracle: str) -> Interval:
    """The share of the oracle's gain that an arm has, paired by seed."""
    base = {r.seed: r.bits_per_byte for r in records if r.arm == "base"}
    best = {r.seed: base[r.seed] - r.bits_per_byte for r in records if r.name == oracle}
    return over_seeds([(base[r.seed] - r.bits_per_byte) / best[r.seed] for r in records if r.name == name])


def oracle_of(records: Sequence[Record], name: str) -> str:
    """The oracle with as many banks as an arm: the same adapters, those of the right domain."""
    banks = next(r.banks for r in records if r.name == name)
    return next((r.name for r in records if r.arm == "oracle" and r.banks == banks), "")


def avoided(courses: Courses) -> Interval | None:
    """The share of the forgetting without a penalty that the penalty avoids, over seeds."""
    if len(courses) < 2:
        return None
    plain, careful = courses.values()
    return over_seeds([1 - c.forgetting.mean() / p.forgetting.mean() for p, c in zip(plain, careful)])


def metrics(records: Sequence[Record], courses: Courses) -> dict[str, Any]:
    """The figures of summary.json."""
    names = list(dict.fromkeys(r.name for r in records))
    found: dict[str, Any] = {"arms": []}
    for name in names:
        mine = [r for r in records if r.name == name]
        gain, oracle = gains(records, name), oracle_of(records, name)
        entry: dict[str, Any] = {"arm": name, "banks": mine[0].banks, "distractors": mine[0].distractors}
        entry |= _numbers("bits_per_byte", over_seeds([r.bits_per_byte for r in mine])) | _numbers("gain", gain)
        entry |= _numbers("perplexity", over_seeds([r.perplexity for r in mine]))
        if oracle and oracle != name:
            entry |= _numbers("kept", kept(records, name, oracle))
        found["arms"].append(entry)
    share = avoided(courses)
    if share is not None:
        plain, careful = courses.values()
        found |= _numbers("avoided_forgetting", share)
        found |= _numbers("forgetting_without", over_seeds([c.forgetting.mean() for c in plain]))
        found |= _numbers("forgetting_with", over_seeds([c.forgetting.mean() for c in careful]))
        found |= _numbers("new_domain_change", over_seeds([c.new / p.new - 1 for p, c in zip(plain, careful)]))
        found["ewc"] = list(courses)[1]
    return found


def _numbers(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def write(
    folder: RunFolder, found: dict[str, Any], courses: Courses, domains: Sequence[str], provenance: dict[str, Any]
) -> None:
    """report.html of the figures that `metrics` found."""
    best = max(found["arms"], key=lambda arm: arm["gain"] if arm["arm"].startswith("oracle") else -1)
    numbers = [report.Number("gain of the right adapter", f"{best['gain']:.1%}", f"{best['arm']}, over the base")]
    share = avoided(courses)
    if share is not None:
        numbers.append(
            report.Number(
                "forgetting avoided", f"{share.mean:.0%}", f"95%: {share.low:.0%} to {share.high:.0%}, {found['ewc']}"
            )
        )
    sections = [report.Section("Arms", arms_table(found["arms"]), "Held-out text of all domains; 95% over seeds.")]
    if curve := distractor_curve(found["arms"]):
        lead = "The share of the oracle's gain that retrieval keeps, among adapters of no domain."
        sections.append(report.Section("Distractors", curve, lead))
    for name, runs in courses.items():
        lead = "Bits per byte of each domain after each stage, mean over seeds; the diagonal is just after learning."
        mean = np.mean([run.bits for run in runs], axis=0)
        sections.append(report.Section(f"One domain after the other: {name}", matrix(mean, domains), lead))
    report.write_report(
        folder.report,
        report.ReportData(
            title=f"{folder.name}: {folder.path.name}",
            subtitle="what banks of adapters are worth",
            numbers=tuple(numbers),
            sections=tuple(sections),
            provenance=provenance,
            config=(folder.path / "config.yaml").read_text(),
        ),
    )


def arms_table(arms: Sequence[dict[str, Any]]) -> str:
    def cell(arm: dict[str, Any], name: str, form: str) -> str:
        if name not in arm:
            return "<td></td>"
        low, high = (format(arm[f"{name}_{end}"], form) for end in ("low", "high"))
        return f'<td class="number">{arm[name]:{form}} <span class="interval">{low} to {high}</span></td>'

    rows = "".join(
        f"<tr><th>{escape(arm['arm'])}</th>{cell(arm, 'bits_per_byte', '.4f')}{cell(arm, 'gain', '.2%')}"
        f"{cell(arm, 'perplexity', '.2f')}{cell(arm, 'kept', '.0%')}</tr>"
        for arm in arms
    )
    named = ("bits per byte", "less than the base", "perplexity", "of the oracle's gain")
    heads = "<th></th>" + "".join(f'<th class="number">{escape(name)}</th>' for name in named)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def distractor_curve(arms: Sequence[dict[str, Any]]) -> str:
    banks = next((arm["banks"] for arm in arms if arm["distractors"]), 0)
    points = [
        (float(arm["distractors"]), arm["kept"], arm["kept_low"], arm["kept_high"])
        for arm in arms
        if arm["arm"].startswith("retrieved each step, ") and "DGR" not in arm["arm"] and arm["banks"] == banks
    ]
    return share_curve(sorted(points), "adapters of no domain", "share of the oracle's gain") if banks else ""


def matrix(bits: np.ndarray, domains: Sequence[str]) -> str:
    names = list(domains)[: bits.shape[1]]
    heads = "".join(f'<th class="number">{escape(name)}</th>' for name in names)

    def cell(value: float, own: bool) -> str:
        return f'<td class="number">{f"<b>{value:.3f}</b>" if own else f"{value:.3f}"}</td>'

    rows = "".join(
        f"<tr><th>{escape(stage)}</th>{''.join(cell(value, i + 1 == n) for i, value in enumerate(row))}</tr>"
        for n, (stage, row) in enumerate(zip(["base", *names], bits))
    )
    return f"<table><thead><tr><th>after</th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
