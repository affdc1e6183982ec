"""LLaDA and Dream checkpoints through `experiments.sample` and `RuvDLLM`, against their published loops."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers

from experiments import wiring
from experiments.runner import main
from experiments.sample import canvas_of, draw, run
from experiments.settings import Drawing, Kernels, ModelPath, Run, Sample
from ruvjax.api import ruvdllm
from ruvjax.core.events import replay
from ruvjax.core.model import Output
from ruvjax.diffusion.sampler import Sampler, sample
from ruvjax.io.huggingface import load_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "record_golden_families.py"
_spec = importlib.util.spec_from_file_location("record_golden_families", SCRIPT)
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

MASK, PROMPT, FREE, STEPS, BLOCK = golden.MASK, golden.LENGTHS[0], golden.CANVAS, golden.STEPS, golden.BLOCK
EOS, EOT = 0, 60
LLADA = Sampler(order="confidence", temperature=0.0, steps=STEPS, block_size=BLOCK)
DREAM = Sampler(order="entropy", temperature=0.0, steps=STEPS, grid="dream")
CASES = {
    "llada.generate": ("llada", LLADA),
    "dream.entropy": ("dream", DREAM),
    "dream.maskgit_plus": ("dream", dataclasses.replace(DREAM, order="confidence")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Published folders with the weights of the golden script, and a tokenizer that names no special token at all."""
    root = tmp_path_factory.mktemp("published")
    for name in ("llada", "dream"):
        config, folder = golden.CONFIGS[name], root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": EOS}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, EOT]}))
        tensors = {key: golden.weight(key, shape) for key, shape in golden.shapes(config).items()}
        save_file(tensors, folder / "model.safetensors")
        # One token fewer than the table has rows, and that one is the mask.
        words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(MASK)}, unk_token="w1"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        words.save(str(folder / "tokenizer.json"))
    return root


def loaded(folders, name):
    return wiring.load(ModelPath(str(folders / name)))


def prompt():
    return " ".join(f"w{token}" for token in golden.rows()[0])


def through_the_verb(folders, name, sampler):
    """The tokens that `experiments.sample` draws after the recorded prompt."""
    model = loaded(folders, name)
    finished = wiring.finish_sampler(sampler, model, print)
    drawing = Drawing(prompt=prompt(), length=PROMPT + FREE, animate=False)
    job = Sample(Run("sample"), ModelPath(), drawing, sampler, Kernels())
    canvas = canvas_of(drawing, model)
    events = draw(job, model, finished, canvas, lambda record: None)
    return replay(canvas.tokens, events, MASK)[0]


@pytest.mark.parametrize("case", CASES)
def test_greedy_sampling_is_token_equal_to_the_recorded_published_loop(case, folders):
    """Where the loop ranks by entropy, the recorded one counts the mask as a token, which a random network gives some
    probability; there the reference is the loop below without it."""
    name, sampler = CASES[case]
    recorded = np.load(golden.GOLDEN)[case]
    model = loaded(folders, name)
    canvas = golden.canvas(golden.rows()[0])
    if name == "llada":
        expected = llada_loop(network_logits(model), canvas, STEPS * BLOCK // FREE, BLOCK)
    else:
        expected = dream_loop(network_logits(model), canvas, STEPS, sampler.order)
    if case == "dream.entropy":
        recorded = expected
    np.testing.assert_array_equal(expected, recorded)
    np.testing.assert_array_equal(through_the_verb(folders, name, sampler), recorded)
    if case != "dream.maskgit_plus":
        llm = ruvdllm.RuvDLLM.with_config(folders / name, ruvdllm.RuvDLLMConfig(sampler_config=sampler))
        text = llm.generate(prompt(), FREE)  # on a row padded to 64 positions
        assert text.split() == [f"w{token}" for token in recorded[PROMPT:]]
    # Without the shift of Dream, or the blocks of LLaDA, the canvas is another one.
    if name == "dream":
        wrong = dataclasses.replace(model, model=dataclasses.replace(model.model, shift=False))
        other = sampler
    else:
        wrong, other = model, dataclasses.replace(sampler, block_size=0)
    found = sample(other, wrong.forward, model.params, canvas[None], jax.random.key(0), mask_id=MASK)
    assert (np.asarray(found.tokens)[0] != recorded).any()


def softmax(x):
    x = np.exp(np.float64(x) - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def network_logits(model):
    """The network as the published loops see it: tokens [length] to logits, but none for the mask."""
    apply = jax.jit(model.model.apply)

    def logits(tokens):
        found = np.array(apply(model.params, tokens[None]).logits[0])
        found[:, MASK] = -1e30
        return found

    return logits


def llada_loop(logits, tokens, steps, block):
    """LLaDA's published algorithm at temperature 0, one row; the first steps take what does not divide."""
    tokens, free = tokens.copy(), tokens == MASK
    start = free.argmax()
    for low in range(start, len(tokens), block):
        masks = int((tokens[low : low + block] == MASK).sum())
        for step in range(steps):
            count = masks // steps + (step < masks % steps)
            scores = softmax(logits(tokens))
            best = scores.argmax(-1)
            sure = np.where((tokens == MASK) & (np.arange(len(tokens)) < low + block), scores.max(-1), -np.inf)
            chosen = np.argsort(-sure, kind="stable")[:count]
            tokens[chosen] = best[chosen]
    return tokens


def dream_loop(logits, tokens, steps, algorithm):
    """Dream's published algorithm at temperature 0, one row."""
    tokens = tokens.copy()
    times = np.linspace(1, 1e-3, steps + 1).astype(np.float32)
    for i in range(steps):
        scores = softmax(logits(tokens))
        masked = tokens == MASK
        count = int(np.float32(masked.sum()) * (1 - times[i + 1] / times[i])) if i < steps - 1 else masked.sum()
        entropy = (scores * np.log(scores + 1e-10)).sum(-1)
        sure = np.where(masked, scores.max(-1) if algorithm == "confidence" else entropy, -np.inf)
        chosen = np.argsort(-sure, kind="stable")[:count]
        tokens[chosen] = scores.argmax(-1)[chosen]
    return tokens


LENGTH = 22
TABLE = np.random.default_rng(0).normal(size=(2, golden.VOCAB, golden.VOCAB)).astype(np.float32) * 2
PLACE = np.random.default_rng(1).normal(size=(LENGTH, golden.VOCAB)).astype(np.float32)
TABLE[:, :, MASK] = -30.0  # a trained network never predicts the mask


def table_logits(tokens):
    """Any module that returns logits will do as the network of the published loops."""
    return TABLE[0][np.roll(tokens, 1)] + TABLE[1][np.roll(tokens, -1)] + PLACE


def table_forward(params, tokens, time, carry):
    logits = params[0][jax.numpy.roll(tokens, 1, 1)] + params[1][jax.numpy.roll(tokens, -1, 1)] + params[2]
    return Output(logits, logits), carry


@pytest.mark.parametrize("start, steps", [(3, 3), (6, 8)])
def test_counts_and_order_are_those_of_the_published_algorithms(start, steps):
    """Also where blocks are cut short and masks do not divide among the steps."""
    tokens = np.full(LENGTH, MASK)
    tokens[:start] = np.arange(start)
    params = (TABLE[0], TABLE[1], PLACE[None])

    def ours(**settings):
        sampler = Sampler(temperature=0.0, **settings)
        state = sample(sampler, table_forward, params, tokens[None], jax.random.key(0), mask_id=MASK)
        return np.asarray(state.tokens)[0]

    whole = -(-(LENGTH - start) // 4)
    expected = llada_loop(table_logits, tokens, steps, 4)
    np.testing.assert_array_equal(ours(order="confidence", block_size=4, steps=steps * whole), expected)
    for order in ("confidence", "entropy"):
        expected = dream_loop(table_logits, tokens, steps, order)
        np.testing.assert_array_equal(ours(order=order, grid="dream", steps=steps), expected)
    if steps == 8:
        assert (ours(order="entropy", steps=steps) != expected).any()  # counted evenly, it comes out otherwise


def test_special_tokens_are_those_of_the_model_and_every_end_token_ends_a_text(folders):
    model = loaded(folders, "llada")
    tokenizer = model.tokenizer
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id) == (MASK, EOS, 0) and model.end_ids == (EOT,)
    assert not model.autoregressive and not loaded(folders, "dream").autoregressive
    assert ruvdllm.DiffusionModel.load_f16(folders / "dream").end_ids == (EOT,)
    recorded = np.load(golden.GOLDEN)["llada.generate"]
    stop = dataclasses.replace(LLADA, eos_handling="stop")
    finished = wiring.finish_sampler(stop, model, print)
    assert isinstance(finished, Sampler)
    assert (finished.eos_id, finished.end_ids, finished.pad_id) == (EOS, (EOT,), 0)
    # Let the fourth token that is drawn be the second end token: everything behind it is padding.
    end = int(recorded[PROMPT + 3])
    ends = dataclasses.replace(finished, end_ids=(end,))
    tokens = through_the_verb(folders, "llada", ends)
    first = PROMPT + int(np.argmax(np.isin(tokens[PROMPT:], (EOS, end))))
    assert tokens[first] == end and (tokens[first + 1 :] == 0).all()
    never = dataclasses.replace(ends, eos_handling="suppress")
    assert not np.isin(through_the_verb(folders, "llada", never)[PROMPT:], (EOS, end)).any()


def test_the_command_reads_a_published_checkpoint(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["sampler=llada", f"sampler.steps={STEPS}", f"sampler.block_size={BLOCK}", "sampler.eos_handling=stop"]
    command += [f"model.path={folders / 'llada'}", f"sample.prompt={prompt()}", f"sample.length={PROMPT + FREE}"]
    code = main("sample", run, [*command, "sample.animate=false", "sample.stream=events.jsonl"])
    assert code == 0, capsys.readouterr().err
    texts = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["texts"]
    assert texts[0].startswith(prompt())


def test_tokens_that_the_tokenizer_lacks_are_never_drawn(folders):
    known = 20
    for seed in range(2):
        canvas = golden.canvas(golden.rows()[0])[None]
        model = loaded(folders, "llada")
        found = [
            sample(sampler, model.forward, model.params, canvas, jax.random.key(seed), mask_id=MASK).tokens[0, PROMPT:]
            for sampler in (Sampler(steps=4, vocabulary=known), Sampler(steps=4))
        ]
        assert (np.asarray(found[0]) < known).all() and (np.asarray(found[1]) >= known).any()
    assert load_model(folders / "llada")[0].vocab_size == golden.VOCAB
