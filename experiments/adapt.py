"""What banks of adapters are worth: `python -m experiments.adapt experiment=talora_domains model.path=...`.

Adapters are trained for texts that the base has not seen, at equal numbers of parameters in every arm, and the held-out
parts of these texts are predicted with the base alone, with one adapter for all, with the right one (the oracle), and
with those that are retrieved. Then one adapter learns the domains one after the other.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import adaptation, evidence, forgetting, retrieving, wiring
from experiments.adapt_settings import Adapt
from experiments.adaptation import Adapters, Attached
from experiments.domains import Domain, check_unseen, read_domains
from experiments.evidence import Record
from experiments.retrieving import Found, Scored
from experiments.runner import main
from experiments.scoring import spread
from experiments.settings import Launch
from experiments.terminal import note
from experiments.wiring import Loaded
from ruvjax.core import allocator
from ruvjax.data.pack import Packed, pack_documents
from ruvjax.data.sources import StdlibSource
from ruvjax.errors import ConfigError
from ruvjax.lora.denoise import Params
from ruvjax.lora.layout import Layout, layout
from ruvjax.lora.talora import TALoRA
from ruvjax.models.transformer import Transformer
from ruvjax.training.provenance import collect_provenance

Judge = Callable[[Any], Scored]  # parameters -> what they make of the held-out text
MOST_BYTES = 6e9  # of a bank with distractors
OTHER_ROWS = 512  # rows of the base's training text: the common hidden state, and the keys of distractors


@dataclass(frozen=True, eq=False)
class Work:
    """What every arm needs."""

    job: Adapt
    loaded: Loaded
    domains: list[Domain]
    others: Packed
    test: list[Packed]

    @cached_property
    def layout(self) -> Layout | None:
        return layout(self.loaded.model, self.job.arms.sites) if self.job.arms.sites else None

    def talora(self, banks: int, rank: int) -> TALoRA:
        return talora_of(self.job, self.loaded, banks, rank, self.layout)


def run(job: Adapt, launch: Launch) -> Path:
    """Train and compare all arms; returns the path of summary.json."""
    started = time.monotonic()
    wiring.check_kernels(job.kernels.attention_impl)
    wiring.start_backend(job.backend)
    loaded = wiring.load(job.model, job.kernels.attention_impl)
    check(job, loaded)
    work = prepare(job, loaded)
    with launch.folder(job.run) as folder:
        provenance = collect_provenance({"seed": job.seed}, vars(allocator.report()))
        folder.write_provenance(provenance)
        records: list[Record] = []
        for seed in range(job.arms.seeds):
            for record in compare(work, seed):
                records.append(record)
                folder.log({"kind": "arm", **asdict(record)})
                note(f"seed {seed}, {record.line()}")
        courses = learn_in_turn(work, folder)
        found = evidence.metrics(records, courses)
        metrics = found | {
            "adapter_parameters": len(work.domains) * job.arms.rank * width(job, loaded),
            "domains": [domain.name for domain in work.domains],
        }
        evidence.write(folder, found, courses, [domain.name for domain in work.domains], provenance)
        note(f"report {folder.report}")
        return folder.finish("done", metrics, time.monotonic() - started)


def check(job: Adapt, loaded: Loaded) -> None:
    """Raises ConfigError for a model that has no residual stream to adapt, InputError for one that saw the domains."""
    model = loaded.model
    if not isinstance(model, Transformer) or loaded.autoregressive or loaded.block_size:
        raise ConfigError("adapt: banks are compared on masked diffusion transformers", "experiment=talora_base")
    if not 0 <= job.arms.layer < model.layers:
        raise ConfigError(f"arms.layer={job.arms.layer} of a model of {model.layers} layers", "0 to layers - 1")
    arms, names = job.arms, len(job.domains.names)
    # An adapter stands in a bank once for every key of its domain.
    numbers = width(job, loaded) * (
        names * arms.keys * arms.rank + arms.rank // arms.main_banks * max(arms.distractors)
    )
    if job.arms.sites and 4 * numbers > MOST_BYTES:
        raise ConfigError(
            f"arms.distractors={list(arms.distractors)} and arms.keys={arms.keys} of {names} domains at sites "
            f"{', '.join(arms.sites)} take {4 * numbers / 1e9:.0f} GB",
            "fewer of them, a smaller rank, or arms.sites=[]",
        )
    for count in sorted({1, *arms.banks}):  # what no bank can be is told before anything is trained
        try:
            talora_of(job, loaded, count, arms.rank // count)
        except ConfigError as error:
            message = f"arms.banks={list(arms.banks)}, {count} of them: {error}"
            raise ConfigError(message, "see arms in configs/adapt.yaml") from error
    check_unseen(job.model.path, job.domains)


def talora_of(job: Adapt, loaded: Loaded, banks: int, rank: int, sites: Layout | None = None) -> TALoRA:
    """`banks` banks with room for every key of every domain."""
    arms, capacity = job.arms, len(job.domains.names) * job.arms.keys
    return adaptation.banks_of(banks, loaded.model.width, rank, capacity, arms.layer, arms.k, arms.temperature, sites)


def width(job: Adapt, loaded: Loaded) -> int:
    """Numbers of an adapter of rank 1."""
    if not job.arms.sites:
        return 2 * loaded.model.width
    sites = layout(loaded.model, job.arms.sites)
    return sites.rows + sites.columns


def prepare(job: Adapt, loaded: Loaded) -> Work:
    length = job.length or loaded.length or 256
    domains = read_domains(job.domains, loaded.tokenizer, length)
    seen = StdlibSource(without=job.domains.packages).documents("train")
    others = spread(pack_documents(seen, loaded.tokenizer, length, "concat"), OTHER_ROWS)
    each = max(1, job.evaluation.rows // len(domains)) if job.evaluation.rows else 0
    test = [spread(domain.test, each) for domain in domains]
    sizes = ", ".join(f"{d.name} {d.train.bytes.sum() / 1e3:,.0f} kB" for d in domains)
    note(f"domains: {sizes}; {sum(part.rows for part in test)} rows of {length} tokens are predicted")
    return Work(job, loaded, domains, others, test)


def compare(work: Work, seed: int):
    """Yields the record of each arm of one seed."""
    job, arms = work.job, work.job.arms
    key = jax.random.fold_in(jax.random.key(job.seed), seed)

    def judge(forward: Any) -> Judge:
        estimate = retrieving.estimator(work.loaded, forward, job.evaluation.samples)
        return lambda params: retrieving.score(estimate, params, work.test, key)

    yield evidence.record("base", seed, judge(retrieving.base_forward(work.loaded))(work.loaded.params))
    one = work.talora(1, arms.rank * len(work.domains))
    adapters = trained(work, one, seed, together=True)
    scored = judge(retrieving.attached_forward(one, work.loaded))
    yield evidence.record("one adapter", seed, scored(Attached(work.loaded.params, adapters, jnp.zeros(()))))
    for banks in sorted(set(arms.banks)):
        config = work.talora(banks, arms.rank // banks)
        adapters = trained(work, config, seed)
        known = judge(retrieving.attached_forward(config, work.loaded))(Attached(work.loaded.params, adapters, None))
        yield evidence.record("oracle", seed, known, banks=banks)
        keys = retrieving.make_keys(
            config, work.loaded, [d.train for d in work.domains], work.others, arms.keys, job.seed + seed
        )
        yield from retrieved(work, config, adapters, keys, judge, seed, banks == arms.main_banks)


def trained(work: Work, config: TALoRA, seed: int, *, together: bool = False) -> Adapters:
    arms = work.job.arms
    found, losses = adaptation.train(
        config,
        work.loaded,
        work.domains,
        work.job.optimizer,
        updates=arms.updates,
        rows=arms.rows,
        seed=1000 * work.job.seed + seed,
        together=together,
    )
    tail = max(1, len(losses) // 10)
    note(f"trained {config.banks}: {np.mean(losses[:tail]):.3f} -> {np.mean(losses[-tail:]):.3f} nats a token")
    return found


def retrieved(
    work: Work, config: TALoRA, adapters: Adapters, keys: retrieving.Keys, judge: Any, seed: int, further: bool
):
    """The arms that retrieve; `further`: every way to retrieve, and with distractors."""
    arms, guide = work.job.arms, work.job.guide
    banks = len(config.banks)

    def found(**settings: Any) -> Found:
        made = retrieving.make_banks(config, adapters, keys, seed=seed, **settings)
        return Found(Params(work.loaded.params, made), jnp.asarray(keys.centres, jnp.float32))

    def scored(when: retrieving.When = "step", guided: bool = False) -> Judge:
        chosen = guide if guided else None
        return judge(retrieving.retrieved_forward(config, work.loaded, when=when, steps=arms.steps, guide=chosen))

    per_step, plain = scored(), found()  # one program for all banks of one size
    yield evidence.record("retrieved each step", seed, per_step(plain), banks=banks)
    if not further:
        return
    yield evidence.record("retrieved once", seed, scored("once")(plain), banks=banks)
    if config.layout is None:  # what DGR chooses for positions acts on the residual stream
        yield evidence.record("retrieved each step, with DGR", seed, scored(guided=True)(plain), banks=banks)
    yield evidence.record("at random", seed, per_step(found(dealt=True)), banks=banks)
    for count in arms.distractors[1:]:
        result = per_step(found(distractors=count))
        yield evidence.record("retrieved each step", seed, result, banks=banks, distractors=count)


def learn_in_turn(work: Work, folder: Any) -> dict[str, list[forgetting.Course]]:
    """Courses over seeds without a penalty and with the strength that the validation parts chose."""
    job, settings = work.job, work.job.sequence
    if not settings.domains:
        return {}
    chosen = work.domains[: settings.domains]
    training = [domain.train for domain in chosen]
    each = max(1, (job.evaluation.rows or 32 * len(work.domains)) // len(work.domains))
    programs = forgetting.programs(settings, work.loaded, job.optimizer, training[0])

    def course(judged: Sequence[Packed], strength: float, seed: int) -> forgetting.Course:
        parts = [spread(part, each) for part in judged]
        found = forgetting.course(programs, settings, work.loaded, training, parts, strength=strength, seed=seed)
        record = {"strength": strength, "forgetting": float(found.forgetting.mean()), "new": found.new}
        folder.log({"kind": "course", "seed": seed, **record, "bits": found.bits.tolist()})
        note(f"in turn, strength {strength:g}: forgets {record['forgetting']:.3f} bits a byte, new {found.new:.3f}")
        return found

    valid, test = [domain.valid for domain in chosen], [domain.test for domain in chosen]
    trials = {strength: course(valid, strength, job.seed + 7919) for strength in (0.0, *settings.strengths)}
    best = forgetting.choose_strength(trials, settings.tolerance)
    note(f"the penalty has strength {best:g}")
    seeds = range(job.arms.seeds)
    return {
        "without": [course(test, 0.0, job.seed + seed) for seed in seeds],
        f"strength {best:g}": [course(test, best, job.seed + seed) for seed in seeds],
    }


if __name__ == "__main__":
    sys.exit(main("adapt", run))
