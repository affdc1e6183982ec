"""Published autoregressive checkpoints: token-equal to transformers, sampled and judged from the command line."""

import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from experiments import drawing, evaluate, sample
from experiments.runner import main
from experiments.wiring import Loaded
from ruvjax.core.params import init, unstack
from ruvjax.data.tokenize import TokenizerConfig, load_tokenizer, train_tokenizer
from ruvjax.decoding.autoregressive import Decoding
from ruvjax.decoding.batching import Request, decode, stream
from ruvjax.diffusion.certificates import Certificate
from ruvjax.io.gguf_export import save_gguf
from ruvjax.io.huggingface import load_model, save_pretrained
from ruvjax.models.causal import forward_left_of
from ruvjax.models.mamba import Mamba
from ruvjax.models.transformer import Transformer

SCRIPT = Path(__file__).parents[2] / "scripts" / "record_golden_families.py"
_spec = importlib.util.spec_from_file_location("record_golden_families", SCRIPT)
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

QUICK = ("llama3", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in golden.CAUSAL]
)
def test_greedy_continuations_are_those_of_transformers(name, tmp_path):
    """64 tokens through the cache, beside another request, against the recorded ones, which had no cache."""
    config = golden.CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {key: golden.weight(key, shape) for key, shape in golden.shapes(config).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model, params, _ = load_model(tmp_path)
    rows, recorded = golden.rows(), np.load(golden.GOLDEN)[f"{name}.greedy"]
    asked = [Request(rows[1], 20, 0), Request(rows[0], len(recorded), 1)]
    told = stream(
        Decoding(temperature=0.0),
        forward_left_of(model),
        unstack(params, model.layers),
        asked,
        jax.random.key(0),
        empty=functools.partial(model.empty_cache, capacity=80),
        vocabulary=model.vocab_size,
        slots=2,
        chunk=5,
        burst=16,
    )
    answers = decode(told)
    np.testing.assert_array_equal(answers[1].tokens, recorded)


TOKENIZER = train_tokenizer(TokenizerConfig("bytes"), [])
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TINY = Transformer(vocab_size=264, layers=1, width=16, heads=2, mlp_width=32, max_length=96, tied_head=False)


def byte_tokenizer(folder: Path) -> Path:
    """256 bytes, `<s>` before every text, `</s>` after it, and no mask."""
    names = ["<s>", "</s>", *LETTERS]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:2]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder / "tokenizer.json"


def id_of(char: str) -> int:
    return 2 + LETTERS.index(char)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama that says "xyz" over and over, whatever it is given."""
    root = tmp_path_factory.mktemp("checkpoint")
    params = jax.tree.map(jnp.zeros_like, init(TINY, jax.random.key(0)))
    turn = {"x": "y", "y": "z", "z": "x"}
    embedding, head = np.zeros((264, 16), np.float32), np.zeros((264, 16), np.float32)
    embedding[:, 0] = 1.0
    for i, (one, next_) in enumerate(turn.items()):
        embedding[id_of(one)] = np.eye(16)[i + 1]
        head[id_of(next_), i + 1] = 3.0
    head[id_of("x"), 0] = 3.0
    params = params.replace(
        embedding=jnp.asarray(embedding), head=jnp.asarray(head), final_norm=params.final_norm + 1.0
    )
    tokenizer = byte_tokenizer(root / "tokenizer")
    save_pretrained(root / "model", TINY, params, tokenizer, eos_token_id=1, bos_token_id=0)
    return root


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(capsys, code: int) -> dict:
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(Path(captured.out.splitlines()[-1]).read_text())["metrics"]


def sampled(*arguments: str) -> int:
    fixed = ["sampler=left_to_right", "sampler.temperature=0", "sample.animate=false", "sample.stream=events.jsonl"]
    return main("sample", sample.run, [*fixed, *arguments])


def records() -> list[dict]:
    return [json.loads(line) for line in Path("events.jsonl").read_text().splitlines()]


def test_a_checkpoint_is_sampled_from_the_command_line(folder, workplace, capsys):
    assert load_tokenizer(folder / "model", masked=False).start_id == 0
    path = f"model.path={folder / 'model'}"
    drawn = metrics(capsys, sampled(path, "sample.prompt=ab", "sample.length=12", "sample.count=3"))
    assert drawn["events"] == 27 and records()[-1]["texts"] == ["abxyzxyzxyz"] * 3
    assert records()[0]["tokens"][0][:3] == [0, id_of("a"), id_of("b")]
    stop = [path, "sample.prompt=ab", "sample.length=40", "sample.stop=[zxyz,nothing]"]
    drawn = metrics(capsys, sampled(*stop))
    assert records()[-1]["texts"] == ["abxy"] and drawn["events"] < 12
    assert drawn["tokens"] == drawn["events"]  # the positions after the stop were never drawn
    for kind, extra in (("F32", []), ("Q8_0", ["model.quantized=true"])):
        model, params, _ = load_model(folder / "model")
        tokens = {"eos_token_id": 1, "bos_token_id": 0}
        save_gguf("m.gguf", model, params, kind, folder / "tokenizer" / "tokenizer.json", tokens=tokens)
        metrics(capsys, sampled("model.path=m.gguf", "sample.prompt=ab", "sample.length=12", *extra))
        assert records()[-1]["texts"] == ["abxyzxyzxyz"]
    metrics(capsys, sampled(path, "sample.prompt=ab", "sample.length=90", "sampler.store=int4", "sampler.tail=4"))
    assert records()[-1]["texts"] == ["ab" + ("xyz" * 30)[:87]]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}ab{% endif %}"
)


def test_a_message_goes_through_the_chat_template_of_the_checkpoint(folder, workplace, capsys):
    path = Path("chat")
    shutil.copytree(folder / "model", path)
    asked = [f"model.path={path}", "sample.prompt=hi", "sample.length=16", "sample.chat=true"]
    assert sampled(*asked) == 2
    assert "holds no chat template" in capsys.readouterr().err
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    written = [0, *map(id_of, "user:hi"), 1, *map(id_of, "ab")]
    metrics(capsys, sampled(*asked))
    assert records()[0]["tokens"][0][: len(written)] == written  # one start token, and the end of the message is one
    assert records()[-1]["texts"][0].endswith("abxyzxy")
    model, params, _ = load_model(path)
    tokens = {"eos_token_id": 1, "bos_token_id": 0}
    save_gguf("chat.gguf", model, params, "F32", path / "tokenizer.json", tokens=tokens)
    metrics(capsys, sampled("model.path=chat.gguf", *asked[1:]))
    assert records()[0]["tokens"][0][: len(written)] == written
    # Without it, text that spells a special token is text.
    metrics(capsys, sampled(asked[0], "sample.prompt=</s>", "sample.length=8"))
    assert records()[0]["tokens"][0][:5] == [0, *map(id_of, "</s>")]


@pytest.mark.parametrize("stop, shown", [([], []), (["sample.stop=[zxyz]"], ["abxy"])])
def test_a_terminal_shows_the_first_text_once_and_cut_at_its_stop(folder, workplace, capsys, monkeypatch, stop, shown):
    """The animation leaves it there, with what was drawn beyond the stop string; then it is printed as it is."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    asked = [f"model.path={folder / 'model'}", "sample.prompt=ab", "sample.length=12", "sample.animate=true"]
    assert main("sample", sample.run, [*asked, "sampler=left_to_right", "sampler.temperature=0", *stop]) == 0
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines()[:-1] if line] == shown and "abxyzxyz" in captured.err


def test_tokens_that_fill_a_row_after_its_end_are_not_counted(folder, workplace, capsys):
    """Read again for every token, a row goes on to the end of the canvas, by rule: the end token is z here."""
    asked = [f"model.path={folder / 'model'}", "sample.prompt=ab", "sample.length=12", f"sampler.eos_id={id_of('z')}"]
    for cache in ("true", "false"):
        assert metrics(capsys, sampled(*asked, f"sampler.cache={cache}"))["tokens"] == 3


def test_a_long_prompt_before_a_gap_is_read_in_pieces(folder, monkeypatch):
    model, params, _ = load_model(folder / "model")
    widths: list[int] = []

    def forward(params, tokens, segments, carry):
        widths.append(tokens.shape[1])
        return forward_left_of(model)(params, tokens, segments, carry)

    monkeypatch.setattr(Loaded, "forward", property(lambda loaded: forward))
    loaded = Loaded(model, unstack(params, 1), TOKENIZER, autoregressive=True)
    row = np.concatenate([TOKENIZER.encode("x" * 40), [TOKENIZER.mask_id] * 3, TOKENIZER.encode("x")])
    found = []
    for size in (64, 16):
        monkeypatch.setattr(drawing, "CHUNK", size)
        widths.clear()
        asked = drawing.draw_with_events(
            loaded, Decoding(temperature=0.0), drawing.Canvas(row[None]), jax.random.key(0)
        )
        found.append(asked.tokens)
        assert max(widths) == min(size, 41)  # an end token stands before the text
    np.testing.assert_array_equal(*found)


def test_a_mamba_and_reading_everything_again_give_the_same(folder, workplace, capsys):
    """A random Mamba, sampled through its state and without it: the two programs share nothing but the model."""
    model = Mamba(vocab_size=264, layers=1, width=16, state=4)
    params = jax.tree.map(lambda x: 3 * x, init(model, jax.random.key(0)))
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    save_pretrained("mamba", model, params, tokenizer, eos_token_id=1, bos_token_id=0)
    asked = ["model.path=mamba", "sample.prompt=abc", "sample.length=20", "sampler.temperature=1", "sample.count=2"]
    metrics(capsys, sampled(*asked))
    cached = records()[-1]["texts"]
    metrics(capsys, sampled(*asked, "sampler.cache=false"))
    assert records()[-1]["texts"] == cached and cached[0] != cached[1]


def test_a_checkpoint_is_judged_from_the_command_line(folder, workplace, capsys, monkeypatch):
    path = f"model.path={folder / 'model'}"
    questions = [
        {"prompt": "abx", "choices": ["yz", "zz", "xx"], "answer": 0},
        {"prompt": "aby ", "choices": ["b", "x"], "answer": 1},
        {"prompt": "x", "choices": ["z", "yzx"], "answer": 0},  # wrong on purpose
    ]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    found = metrics(capsys, main("evaluate", evaluate.run, [path, "choices=q.jsonl"]))
    assert found["questions"] == 3 and found["accuracy"] == pytest.approx(2 / 3)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    monkeypatch.setattr(evaluate, "certify", lambda: [Certificate("sure", 1.0, (0.0, 2.0), "doubtful", 3.0)])
    both = metrics(capsys, main("evaluate", evaluate.run, [path, "choices=q.jsonl", "certify=true", "run.dir=both"]))
    assert both == found | {"certificates": 1}
    told = Path("both/report.html").read_text()
    assert "holds: sure" in told and "q.jsonl" in told and "3 questions: 66.7% right" in told
    Path("corpus").mkdir()
    for n in range(20):
        (Path("corpus") / f"{n}.txt").write_text("xyz" * 800 + str(n))
    corpus = ["data=text", "data.path=corpus", "length=64", "evaluation.batch=4"]
    found = metrics(capsys, main("evaluate", evaluate.run, [path, *corpus]))
    assert 0 < found["bits_per_byte"] < 2 and found["perplexity"] > 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "q.jsonl:1 is not JSON"),
        ("\n" + "[" * 100_000, "q.jsonl:2 is nested too deeply"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "two or more as choices"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer=2 is not the place of a choice"),
        (json.dumps({"prompt": "a" * 99, "choices": ["b", "c"], "answer": 0}), "the model's context 96"),
        ("", "holds no question"),
    ],
)
def test_bad_questions_are_one_clear_line(folder, workplace, capsys, line, message):
    Path("q.jsonl").write_text(line)
    assert main("evaluate", evaluate.run, [f"model.path={folder / 'model'}", "choices=q.jsonl"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_bad_checkpoints_and_prompts_are_one_clear_line(folder, workplace, capsys):
    def said(*arguments):
        code = sampled(*arguments)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return code, error.strip().splitlines()[-1]

    path = f"model.path={folder / 'model'}"
    code, line = said(path, f"sample.prompt={'a' * 120}")
    assert code == 2 and "the prompt has 121 tokens, the model's context 96" in line
    assert "no mask token" in said(path, "sample.prompt=a<mask>b")[1]
    assert said("model.path=nowhere/at/all")[0] == 2

    def changed(name, edit):
        target = Path(name)
        target.mkdir()
        for file in (folder / "model").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        edit(target)
        return said(f"model.path={name}", "sample.prompt=a", "sample.length=8")

    def configured(**values):
        def edit(target):
            config = json.loads((target / "config.json").read_text())
            (target / "config.json").write_text(json.dumps(config | values))

        return edit

    code, line = changed("unknown", configured(model_type="gpt_bigcode"))
    assert code == 2 and "model_type='gpt_bigcode' is not known" in line

    def cut(target):
        (target / "model.safetensors").rename(target / "model-00001-of-00002.safetensors")
        weights = {"lm_head.weight": "model-00002-of-00002.safetensors"}
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    code, line = changed("sharded", cut)
    assert code == 2 and "model-00002-of-00002.safetensors: this shard is missing" in line

    def shortened(target):
        tensors = load_file(target / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:200].copy()
        save_file(tensors, target / "model.safetensors")
        configured(vocab_size=200)(target)

    code, line = changed("other_tokenizer", shortened)
    assert code == 2 and "the tokenizer has 258 entries, the model 200" in line

    def overflowing(target):
        tensors = load_file(target / "model.safetensors")
        tensors["lm_head.weight"] = np.full_like(tensors["lm_head.weight"], 3e38)
        save_file(tensors, target / "model.safetensors")

    code, line = changed("overflowing", overflowing)
    assert code == 1 and "logits are not finite" in line
