"""The texts of each domain, tokenized and packed."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from experiments.adapt_settings import Domains
from ruvjax.data.pack import Packed, pack_documents
from ruvjax.data.sources import Document, StdlibSource, TextSource, split_within
from ruvjax.data.tokenize import Tokenizer
from ruvjax.errors import InputError


@dataclass(frozen=True, eq=False)
class Domain:
    """One domain: training rows as one stream, the others by document."""

    name: str
    train: Packed
    valid: Packed
    test: Packed


def read_domains(settings: Domains, tokenizer: Tokenizer, length: int) -> list[Domain]:
    """Raises InputError for a package or text that is not there, or too small to cut."""
    found: dict[str, list[Document]] = dict(StdlibSource(without=settings.packages).packages())
    for name, path in settings.texts.items():
        splits = TextSource(path=path).splits()
        found[name] = [document for documents in splits.values() for document in documents]
    return [_domain(name, documents, settings, tokenizer, length) for name, documents in found.items()]


def _domain(name: str, documents: list[Document], settings: Domains, tokenizer: Tokenizer, length: int) -> Domain:
    parts = split_within(documents, settings.valid_share, settings.test_share)
    if not all(parts.values()):
        raise InputError(f"domain {name!r} is too small to cut into three parts", "leave it out")
    try:
        train = pack_documents(parts["train"], tokenizer, length, "concat")
    except InputError as error:
        raise InputError(f"domain {name!r}: {error}", "leave it out, or lower length") from error
    valid, test = (pack_documents(parts[split], tokenizer, length, "per_document") for split in ("valid", "test"))
    return Domain(name, train, valid, test)


def check_unseen(model_path: str, settings: Domains) -> None:
    """Raises InputError where the run that made the model says that it saw a package which is to be a domain."""
    config = Path(model_path).expanduser() / "config.yaml"
    if not settings.packages or not config.is_file():
        return
    data = OmegaConf.to_container(OmegaConf.load(config)).get("data", {})  # pyright: ignore
    if not str(data.get("_target_", "")).endswith("StdlibSource"):
        return
    seen = [name for name in settings.packages if name not in (data.get("without") or ())]
    if seen:
        raise InputError(
            f"{config}: the model was trained on a library that holds {', '.join(seen)}",
            "train the base with experiment=talora_base, or data.without=[...]",
        )
