"""Hostile cases for the command line, made by a grammar from a fixed seed: what is run, on what, what must come of it.

A case runs one command in a folder of its own, which holds copies of what `needs` names (see tests/test_hostile.py: a
model, what it became, one with a tokenizer, runs of every kind, a gallery), changed by `prepare`. All paths are
relative to that folder. One function makes the cases of one family.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

SEED = 20260
HUGE = 2**63
NAN, INF = math.nan, math.inf
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
Step = Callable[[Path], object]


class Expect(StrEnum):
    """What must come of a case. Whatever it is: no traceback, and nothing lost."""

    MUST_REFUSE = "must be refused"
    SAME = "accepted, with the numbers of the reference case it is like"
    SAME_OR_REFUSE = "refused, or accepted with the numbers of the reference case it is like"
    ANY = "refused, or accepted with a run that can be read and finite numbers"


MUST_REFUSE, SAME, SAME_OR_REFUSE, ANY = Expect


@dataclass(frozen=True)
class Case:
    """One command in one folder. `replaces` names a folder that may be replaced, `resumes` a run that is gone on with.

    `says` is what the one line of a refusal must contain. `rounding` is for the same weights at other places in memory,
    whose products differ in their last bit.
    """

    family: str
    command: str
    arguments: tuple[str, ...]
    expectation: Expect
    description: str
    needs: tuple[str, ...]
    prepare: tuple[Step, ...] = ()
    out: str = "run"
    like: str = ""
    replaces: str = ""
    resumes: str = ""
    says: str = ""
    rounding: bool = False


# What a command needs when nothing is odd

PLAIN: dict[str, dict[str, Any]] = {
    "trace": {"--window": "16", "--document-length": "8", "--shift": "1", "--side": "q", "--no-control": None},
    "spans": {"--short": "8", "--long": "16"},
    "retrieval": {"--window": "16", "--trials": "2", "--keys": "10", "--values": "10"},
    "heads": {"--window": "16", "--document-length": "8"},
    "distill": {},
    "report": {},
}
STATES = {"--states": None, "--window": "16", "--document-length": "8"}
TEXT = {"--task": "passkey", "--window": "420", "--distance": "150", "--trials": "1"}
POSITIONAL = {
    "trace": ("model",),
    "spans": ("model", "after"),
    "retrieval": ("model",),
    "heads": ("model",),
    "distill": ("config.toml",),
    "report": ("found",),
}
NEEDS = {
    "trace": ("model",),
    "spans": ("model", "after"),
    "retrieval": ("model",),
    "heads": ("model",),
    "distill": ("model", "config.toml"),
    "report": ("found",),
}
STREAM = {"kind": "key_value", "document_length": 16, "distinct": [1, 4], "keys": 20, "values": 20}
SHORT_PHASE = {
    "name": "short",
    "window": 16,
    "steps": 1,
    "batch_tokens": 32,
    "lr": 3e-3,
    "theta": 300.0,
    "warmup": 1,
    "data": STREAM,
    "terms": [{"kind": "cross_entropy"}],
}
LONG_PHASE = {
    **SHORT_PHASE,
    "name": "long",
    "window": 32,
    "theta": 1e4,
    "terms": [{"kind": "cross_entropy", "weight": 0.5}, {"kind": "kd"}],
}
CONFIG = {"student": "model", "teacher": "model", "out": "run", "log_every": 1, "save_every": 1, "phases": [LONG_PHASE]}
RESUMABLE = {**CONFIG, "out": "stopped", "phases": [SHORT_PHASE, {**LONG_PHASE, "steps": 3}]}


def case(
    command: str,
    expectation: Expect,
    description: str,
    *prepare: Step,
    options: dict[str, Any] | None = None,
    positional: Sequence[str] | None = None,
    extra: Sequence[str] = (),
    out: str | None = "run",
    needs: Sequence[str] = (),
    **more: Any,
) -> Case:
    """A case; `options` take the place of the plain ones, or join them (None leaves one out, [] gives it no value)."""
    words = list(POSITIONAL[command] if positional is None else positional)
    if out is not None and command != "distill":
        words += ["--out", out]
    plain = {key: [] if value is None else value for key, value in PLAIN[command].items()}
    for key, value in {**plain, **(options or {})}.items():
        if value is None:
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [word for one in values for word in ((key,) if one == [] else (key, str(one)))]
    like = more.pop("like", command)
    wanted = tuple(dict.fromkeys((*NEEDS[command], *needs)))
    found = out or "run"
    return Case("", command, (*words, *extra), expectation, description, wanted, prepare, found, like, **more)


def on(**options: Any) -> dict[str, Any]:
    """Options by keyword: `on(no_control=True, shift="1")`; True gives a flag, None leaves a plain option out."""
    return {f"--{key.replace('_', '-')}": [] if value is True else value for key, value in options.items()}


STATES_ON = on(states=True, window="16", document_length="8")


# Steps that change a file of a case's folder


def put(file: str, content: str | bytes) -> Step:
    """A file of that content, and the folders it lies in."""

    def step(work: Path) -> None:
        clear(work / file)
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))

    return step


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(file: str) -> Step:
    return lambda work: clear(work / file)


def move(file: str, to: str) -> Step:
    return lambda work: shutil.move(work / file, work / to)


def copy(file: str, to: str) -> Step:
    def step(work: Path) -> None:
        copied = shutil.copytree if (work / file).is_dir() else shutil.copy
        copied(work / file, work / to)

    return step


def link(file: str, to: str) -> Step:
    """A symlink at `file` that leads to `to`."""

    def step(work: Path) -> None:
        clear(work / file)
        (work / file).symlink_to(to)

    return step


def loop(file: str) -> Step:
    return link(file, Path(file).name)


def folder(file: str) -> Step:
    """An empty folder in place of the file."""

    def step(work: Path) -> None:
        clear(work / file)
        (work / file).mkdir(parents=True)

    return step


def rewrite(file: str, change: Callable[[bytes], bytes]) -> Step:
    return lambda work: (work / file).write_bytes(change((work / file).read_bytes()))


def cut(file: str, share: float) -> Step:
    """Only the first `share` of the file's bytes."""
    return rewrite(file, lambda content: content[: int(len(content) * share)])


def flip(file: str, place: float, bit: int) -> Step:
    """One bit of the file, `place` of the way through it, is another."""

    def change(content: bytes) -> bytes:
        at = int(len(content) * place)
        return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]

    return rewrite(file, change)


def edit(file: str, change: Callable[[Any], Any]) -> Step:
    """A file of JSON, its value changed."""

    def step(work: Path) -> None:
        value = json.loads((work / file).read_text())
        changed = change(value)
        (work / file).write_text(json.dumps(value if changed is None else changed))

    return step


def set_keys(file: str, **entries: Any) -> Step:
    return edit(file, lambda value: value.update(entries))


def drop_key(file: str, key: str) -> Step:
    return edit(file, lambda value: {name: one for name, one in value.items() if name != key})


def edit_weights(file: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Step:
    """A safetensors file, its tensors by name changed."""

    def step(work: Path) -> None:
        tensors = dict(load_file(work / file))
        changed = change(tensors)
        save_file(tensors if changed is None else changed, work / file, {"format": "pt"})

    return step


TABLE_OF = {run: f"{run}/tables/{table}.parquet" for run, table in
            (("found", "retrieval"), ("traced", "deltas"), ("compared", "spans"), ("trained", "losses"))}  # fmt: skip
"""The table that is changed, of each run."""


def edit_frame(run: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Step:
    """A table of a run, changed."""

    def step(work: Path) -> None:
        file = work / TABLE_OF[run]
        change(pd.read_parquet(file)).to_parquet(file, index=False)

    return step


def toml_file(table: dict[str, Any]) -> Step:
    return put("config.toml", as_toml(table))


def as_toml(table: dict[str, Any]) -> str:
    """A table of Python's types as TOML; a key that is None is left out."""
    phases = table.get("phases")
    tables = isinstance(phases, list) and phases and all(isinstance(phase, dict) for phase in phases)
    rest = {key: value for key, value in table.items() if not (tables and key == "phases")}
    lines = [f"{json.dumps(key)} = {inline(value)}" for key, value in rest.items() if value is not None]
    for phase in phases if tables else ():
        lines += ["[[phases]]"]
        lines += [f"{json.dumps(key)} = {inline(value)}" for key, value in phase.items() if value is not None]
    return "\n".join(lines) + "\n"


def inline(value: Any) -> str:
    if isinstance(value, dict):
        inside = (f"{json.dumps(key)} = {inline(one)}" for key, one in value.items() if one is not None)
        return "{" + ", ".join(inside) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)


# Words of the grammar


def int_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    """Values for an option that takes a whole number of 1 or more, and whether one can be right."""
    never = ["0", "-1", "-9" + "9" * 30, "1e300", "nan", "inf", "1.5", "", " ", "0x10", "q", "--window", "True", "1,5"]
    never += ["\x1b[31mred", "x" * 3000, "\udcff", "½", "\u202e61"]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in never] + [(str(HUGE), ANY), ("\u0663", ANY)] * 3)


def float_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    """Values for an option that takes a finite number."""
    never = ["nan", "inf", "-inf", "1e400", "", "1,5", "abc", "--shift", "\udcff", "\x1b[0m", "x" * 3000, "0x1"]
    maybe = ["1e300", "-1e300", "1e-300", "0", "-0.0", "\u0663.\u0665", "9" * 300, "1_0", "-16", "1e17"]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in never] + [(word, ANY) for word in maybe])


def index_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    """Values for an option that takes a layer, a head or a pair of the model, of which there are eight at most."""
    never = ["-1", "8", "99", str(HUGE), "9" * 40, "nan", "", "1.5", "q", "--head", "all", "\udcff", "0,1"]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in never] + [("1.0", ANY)])


def choice_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    """Values for an option that takes one of a few words."""
    never = [
        "",
        " ",
        "None",
        "0",
        "--side",
        "x" * 3000,
        "\udcff",
        "\x1b[31m",
        "\u202eq",
        "q,k",
        "\n",
        "layer\0"[:-1] + "s",
    ]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in never])


def ids_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    """Values for --document."""
    never = ["", ",", "-1", "64", "5,64", "1e3", "5;6", str(HUGE), "9" * 5000, "x" * 3000, "\udcff", "5,nan", "5.0"]
    maybe = ["5", "0,0", " 5 , 6 ", "5,,6", "\u0663,\u0664", "1_0", "+5,6", "5 6\n7 8", "63"]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in never] + [(word, ANY) for word in maybe])


def file_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    """Values for an option that takes a file of tokens."""
    never = ["", ".", "..", "absent.txt", "model", "x" * 300, "/dev/null", "a\nb", "\udcff", "~", "model/config.json"]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in [*never, "-", "loop", "\x1b[31m"]])


def text_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    """Values for --text, of a model with a tokenizer or without."""
    never = ["", ".", "..", "absent.txt", "model", "x" * 300, "/dev/null", "a\nb", "\udcff", "~", SHARD, "loop"]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in [*never, "-", "model/config.json/", "\x1b[31m"]])


def count_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    """Values for an option that takes a whole number of 0 or more, of what the plain model cannot do."""
    never = [
        "-1",
        "1",
        "1e300",
        "nan",
        "inf",
        "1.5",
        "",
        " ",
        "q",
        "--window",
        "x" * 3000,
        "\udcff",
        str(HUGE),
        "9" * 40,
    ]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in never] + [("-0", ANY), ("\u0660", ANY)])


def device_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    never = ["", "gpu", "cuda:99", "meta", "hpu", "cpu:x", "x" * 3000, "\udcff", "xla", "cpu;rm", "mps", "vulkan"]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in never] + [("cpu:0", ANY), ("cpu:7", ANY)])


def seed_words(rng: random.Random) -> Iterator[tuple[str, Expect]]:
    never = ["-1", str(HUGE), "9" * 40, "nan", "1.5", "", "x", "\udcff", "1e3"]
    yield from shuffled_forever(rng, [(word, MUST_REFUSE) for word in never] + [(str(HUGE - 1), ANY)] * 2)


def shuffled_forever(rng: random.Random, words: list[Any]) -> Iterator[Any]:
    return cycle(rng.sample(words, len(words)))


WORDS = {
    "int": int_words,
    "float": float_words,
    "index": index_words,
    "choice": choice_words,
    "ids": ids_words,
    "file": file_words,
    "text": text_words,
    "count": count_words,
    "device": device_words,
    "seed": seed_words,
}
# By command and option: its kind, and values that are right.
OPTIONS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "trace": {
        "--window": ("int", ("8", "16", "32")),
        "--document": ("ids", ("5", "5,6", "1,2,3,4")),
        "--document-length": ("int", ("1", "4", "8", "16")),
        "--tokens": ("file", ("docs.txt",)),
        "--text": ("text", ("words.txt",)),
        "--sweep": ("choice", ("dose", "layer", "head", "pair", "pair-tokens", "jitter", "theta")),
        "--shift": ("float", ("0", "0.25", "-3", "16", "100000")),
        "--side": ("choice", ("q", "k", "qk")),
        "--layer": ("index", ("0", "1")),
        "--head": ("index", ("0", "1")),
        "--pair": ("index", ("0", "3")),
        "--seed": ("seed", ("0", "7", str(HUGE - 1))),
        "--device": ("device", ("cpu",)),
        "--dtype": ("choice", ("float64", "float32", "bfloat16", "float16")),
        "--attn": ("choice", ("sdpa", "eager", "flash_attention_2")),
    },
    "spans": {
        "--short": ("int", ("1", "8", "64")),
        "--long": ("int", ("1", "8", "64")),
        "--window": ("int", ("8", "16")),
        "--document-length": ("int", ("1", "8")),
        "--tokens": ("file", ("docs.txt",)),
        "--text": ("text", ("words.txt",)),
        "--seed": ("seed", ("0", str(HUGE - 1))),
        "--device": ("device", ("cpu",)),
        "--dtype": ("choice", ("float64", "float32", "bfloat16")),
        "--attn": ("choice", ("sdpa", "eager")),
    },
    "retrieval": {
        "--task": ("choice", ("key_value",)),
        "--window": ("int", ("4", "16", "32")),
        "--distance": ("int", ("2", "4", "14")),
        "--trials": ("int", ("1", "3")),
        "--keys": ("int", ("2", "10", "20")),
        "--values": ("int", ("1", "10", "30")),
        "--seed": ("seed", ("0", str(HUGE - 1))),
        "--device": ("device", ("cpu",)),
        "--dtype": ("choice", ("float64", "float32", "bfloat16")),
        "--attn": ("choice", ("sdpa", "eager")),
    },
    "distill": {
        "--seed": ("seed", ("0", str(HUGE - 1))),
        "--device": ("device", ("cpu",)),
        "--dtype": ("choice", ("float32", "bfloat16")),
        "--attn": ("choice", ("sdpa", "eager")),
    },
    "heads": {
        "--window": ("int", ("8", "16", "32")),
        "--document-length": ("int", ("1", "4", "8")),
        "--tokens": ("file", ("docs.txt",)),
        "--text": ("text", ("words.txt",)),
        "--layer": ("index", ("0", "1")),
        "--trials": ("count", ("0",)),
        "--distance": ("int", ("8",)),
        "--seed": ("seed", ("0", str(HUGE - 1))),
        "--device": ("device", ("cpu",)),
        "--dtype": ("choice", ("float64", "float32", "bfloat16", "float16")),
        "--attn": ("choice", ("sdpa", "eager")),
    },
}
FLAGS = {
    "trace": ("--masked", "--control", "--no-control", "--unmasked", "--packed", "--random"),
    "spans": ("--masked", "--unmasked", "--packed", "--random"),
    "retrieval": (),
    "distill": (),
    "heads": ("--masked", "--pairs", "--unmasked", "--packed", "--random"),
}
REPEATED = ("--sweep", "--shift", "--side", "--layer", "--head", "--pair", "--task", "--distance")
PROSE = "The quick brown fox jumps over the lazy dog, and the dog does not so much as open an eye. " * 3
TEXT_FILE = put("words.txt", PROSE)
DOCS = put("docs.txt", "5 6 7 8\n\n9 10 11 12 13\n14 15\n")


def odd_options(rng: random.Random) -> Iterator[Case]:
    """One option with a value that it cannot take, or with one at its edge."""
    each = {"trace": 5, "spans": 4, "retrieval": 5, "distill": 4, "heads": 5}
    for command, options in OPTIONS.items():
        for option, (kind, _) in options.items():
            clash = {"--shift": None, "--side": None} if option == "--sweep" else {}
            if command == "spans" and option not in ("--short", "--long", "--seed"):
                clash = STATES_ON
            for word, expectation in islice(WORDS[kind](rng), each[command]):
                if "\x1b" in word or "\udcff" in word or len(word) > 30:
                    told = f"{option} {word[:30]!a} ({len(word)} characters)"
                else:
                    told = f"{option} {word!r}"
                yield case(command, expectation, told, DOCS, TEXT_FILE, loop("loop"), options={**clash, option: word})


def mixed_options(rng: random.Random) -> Iterator[Case]:
    """Several options at once, each right by itself; of those that can be repeated, one or two."""
    for command, count in (("trace", 36), ("spans", 10), ("retrieval", 24), ("heads", 16)):
        options = OPTIONS[command]
        for _ in range(count):
            given: dict[str, Any] = {}
            for option in rng.sample(sorted(options), rng.randint(2, 5)):
                values = options[option][1]
                given[option] = tuple(rng.choices(values, k=rng.randint(1, 2) if option in REPEATED else 1))
            for flag in FLAGS[command]:
                if rng.random() < 0.25:
                    given[flag] = []
            base: dict[str, Any] = {"--shift": None, "--side": None} if "--sweep" in given else {}
            if command == "spans" and rng.random() < 0.6:
                base = STATES_ON
            if command == "spans":
                given.pop("--short", None)
            told = " ".join(f"{key} {' '.join(map(str, value))}".strip() for key, value in given.items())
            yield case(command, ANY, told, DOCS, TEXT_FILE, options={**base, **given})


def command_lines(rng: random.Random) -> Iterator[Case]:
    """What is said twice, excludes each other, is not there, or says nothing."""

    def refused(command: str, told: str, says: str = "", **given: Any) -> Case:
        return case(command, MUST_REFUSE, told, DOCS, says=says, **given)

    yield case("trace", SAME, "--window twice, the last one plain", extra=["--window", "16"], options=on(window="32"))
    yield case(
        "trace",
        SAME,
        "--control and then --no-control",
        options={"--no-control": None, "--control": []},
        extra=["--no-control"],
    )
    yield case("trace", SAME, "--window=16", options=on(window=None), extra=["--window=16"])
    yield refused("trace", "--window= with nothing", options=on(window=None), extra=["--window="])
    yield refused("trace", "--out twice, the last one a file", extra=["--out", "docs.txt"])
    yield refused("trace", "an option cut short", extra=["--wind", "16"])
    yield refused("trace", "an option in capitals", extra=["--WINDOW", "16"])
    yield refused("trace", "an option without its value", extra=["--seed"])
    yield refused("trace", "a flag with a value", extra=["--masked=yes"])
    yield refused("trace", "a second model", extra=["after"])
    yield refused("trace", "no --out", out=None)
    yield refused("trace", "an option of spans", extra=["--states"])
    yield refused("trace", "an option of retrieval", extra=["--trials", "2"])
    yield refused("trace", "--sweep and --shift", options=on(sweep="pair"))
    yield case("trace", ANY, "--sweep and --layer", options=on(shift=None, sweep="pair", layer="0"))
    yield refused("trace", "--sweep and --pair", options=on(shift=None, sweep="layer", pair="0"))
    yield refused("trace", "--sweep and a --layer that is not there", options=on(shift=None, sweep="head", layer="2"))
    yield refused("trace", "--tokens and --document", options=on(tokens="docs.txt", document="5"))
    yield refused("trace", "a window shorter than its document", options=on(window="4"))
    yield refused("trace", "a window of broken documents", options=on(window="20"))
    yield refused("trace", "a window longer than the tokens", options=on(tokens="docs.txt", window="12"))
    yield refused("trace", "a head that only queries have", options=on(head="1", side="k"))
    for sweep in ("layer", "head", "pair"):
        yield refused(
            "trace",
            f"--sweep {sweep} of both sides: nothing to measure",
            options=on(shift=None, sweep=sweep, side="qk"),
        )
    for option in ("layer", "head", "pair"):
        yield refused("trace", f"--{option} good and then bad", options={f"--{option}": ("0", "9")})
        yield case("trace", ANY, f"--{option} 0 twice", options={f"--{option}": ("0", "0")})
    yield case("trace", ANY, "--shift 1 twice", options=on(shift=("1", "1")))
    yield case("trace", ANY, "--side q twice", options=on(side=("q", "q")))
    yield case(
        "trace",
        ANY,
        "all defaults but the window, with the control",
        options=on(shift=None, side=None, no_control=None, document_length=None, window="64"),
    )
    yield case("trace", ANY, "flash attention without a GPU", options=on(attn="flash_attention_2"))
    yield case("trace", ANY, "one token, masked", options=on(window="1", document_length="1", masked=True))
    yield case(
        "trace",
        ANY,
        "every document one token, masked, with the control",
        options=on(document_length="1", masked=True, no_control=None),
    )
    yield case("trace", ANY, "a window beyond max_position_embeddings", options=on(window="256"))
    for words in ([], [""], ["--out"], ["--out", "run"], ["", "--out", ""]):
        yield replace(refused("trace", f"arguments {words}"), arguments=tuple(words))
    for words in (["model"], ["model", "--out", "run"], ["model", "after", "model", "--out", "run"], []):
        yield replace(refused("spans", f"arguments {words}"), arguments=tuple(words))
    for words in ([], ["--out", "run"], ["found"], ["found", "--out"]):
        yield replace(refused("report", f"arguments {words}"), arguments=tuple(words))
    for words in ([], ["--resume"], ["config.toml", "config.toml"], ["--out", "x"]):
        yield replace(refused("distill", f"arguments {words}"), arguments=tuple(words))
    for word in ("tracer", "", "TRACE", "\udcff", "\x1b[31m", "--version", "-h", "x" * 2000):
        yield replace(refused("trace", f"command {word[:20]!a}"), command=word, arguments=("model",))
    for given in (
        on(window="16"),
        on(tokens="docs.txt"),
        on(masked=True),
        on(dtype="float32"),
        on(attn="eager"),
        on(document_length="8"),
        on(device="cuda"),
        on(text="docs.txt"),
        on(packed=True),
        on(random=True),
    ):
        yield refused("spans", f"{next(iter(given))} without --states", options=given)
    yield refused("spans", "a window of broken documents", options=on(states=True, window="20", document_length="8"))
    yield refused(
        "spans", "--tokens and --document-length", options=on(states=True, tokens="docs.txt", document_length="3")
    )
    yield case("spans", ANY, "--short above --long", options=on(short="64", long="8"))
    yield case("spans", ANY, "one checkpoint twice", positional=["model", "model"])
    yield case("spans", ANY, "one checkpoint twice, with states", positional=["model", "model"], options=STATES_ON)
    yield case("spans", ANY, "all defaults", options=on(short=None, long=None))
    for window in ("4", "6", "8"):
        yield refused(
            "retrieval", f"--window {window}: no distance by default, nothing to measure", options=on(window=window)
        )
    yield refused("retrieval", "an odd window", options=on(window="17"))
    yield refused("retrieval", "an odd distance", options=on(distance="3"))
    yield refused("retrieval", "a distance beyond the window", options=on(distance="16"))
    yield refused("retrieval", "a distance that is good and one that is not", options=on(distance=("4", "99")))
    yield refused("retrieval", "more keys than the vocabulary has", options=on(keys="60"))
    yield refused("retrieval", "more values than the vocabulary has", options=on(values="60"))
    yield case("retrieval", ANY, "keys and values that just fit", options=on(keys="30", values="30"))
    yield refused("retrieval", "keys and values that just do not fit", options=on(keys="30", values="31"))
    yield case("retrieval", ANY, "--distance 4 twice", options=on(distance=("4", "4")))
    yield case("retrieval", SAME, "--task key_value twice", options=on(task=("key_value", "key_value")))
    yield case("retrieval", ANY, "keys and window of all defaults", options=on(keys=None, values=None))
    for task in ("passkey", "niah_single_1", "vt", "fwe"):
        yield refused("retrieval", f"--task {task} without a tokenizer", options=on(task=task))

    for words in ([], ["--out", "run"], ["model"], ["model", "after", "--out", "run"]):
        yield replace(refused("heads", f"arguments {words}"), arguments=tuple(words))
    yield refused("heads", "--distance without --trials", options=on(distance="8"), says="--trials")
    yield refused("heads", "--trials without a tokenizer", options=on(trials="2"), says="tokenizer")
    yield refused("heads", "a window of broken documents", options=on(window="20"))
    yield refused("heads", "--head, which heads has not", options=on(head="0"))
    yield refused("heads", "--layer good and then bad", options=on(layer=("0", "9")))
    yield case("heads", ANY, "--layer 0 twice", options=on(layer=("0", "0")))
    yield case("heads", ANY, "one token, with pairs", options=on(window="1", document_length="1", pairs=True))
    yield case("heads", ANY, "every document one token, masked", options=on(document_length="1", masked=True))
    yield case("heads", ANY, "a window beyond max_position_embeddings", options=on(window="256"))
    yield case("heads", SAME, "--window twice, the last one plain", extra=["--window", "16"], options=on(window="32"))


def sources(rng: random.Random) -> Iterator[Case]:
    """What a window is made of: text, random ids, documents; none, one or two of them, with a tokenizer or without."""
    given = {"--text": "words.txt", "--tokens": "docs.txt", "--random": [], "--packed": [], "--document": "5,6"}
    for command in ("trace", "heads", "spans"):
        base = STATES_ON if command == "spans" else {}
        words = {name: value for name, value in given.items() if command == "trace" or name != "--document"}
        models = {
            "with a tokenizer": ["reader"] if command != "spans" else ["reader", "reader"],
            "without a tokenizer": list(POSITIONAL[command]),
        }
        for told, positional in models.items():
            for size in (1, 2, 3):
                for _ in range(3):
                    names = rng.sample(sorted(words), size)
                    options = {**base, **{name: words[name] for name in names}}
                    if "--tokens" in names:
                        options |= {"--window": None, "--document-length": None}
                    two = len({"--text", "--tokens", "--random", "--document"} & set(names)) > 1
                    expectation = MUST_REFUSE if two else ANY
                    yield case(
                        command,
                        expectation,
                        f"{' and '.join(names)}, {told}",
                        DOCS,
                        TEXT_FILE,
                        options=options,
                        positional=positional,
                        needs=["reader"],
                    )


def odd_texts(rng: random.Random) -> Iterator[Case]:
    """Files for --text, read by a model with a tokenizer: what is no text, and what is too little."""

    def read(expectation: Expect, told: str, content: str | bytes) -> Case:
        command = rng.choice(["trace", "heads", "spans"])
        base = STATES_ON if command == "spans" else {}
        return case(
            command,
            expectation,
            f"text: {told}",
            put("words.txt", content),
            options={**base, "--text": "words.txt"},
            positional=["reader", "reader"] if command == "spans" else ["reader"],
            needs=["reader"],
        )

    never: dict[str, str | bytes] = {
        "nothing": "",
        "seven bytes, of eight that are needed": "seven b",
        "NUL bytes": b"\0" * 100,
        "text and one NUL byte": b"words " * 9 + b"\0",
        "binary": bytes(rng.randrange(256) for _ in range(500)),
        "Latin-1": "caf\u00e9 ".encode("latin-1") * 20,
        "UTF-16": PROSE.encode("utf-16"),
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    }
    for told, content in never.items():
        yield read(MUST_REFUSE, told, content)
    maybe: dict[str, str | bytes] = {
        "eight bytes, just enough": "eight by",
        "blanks": " \n\t\n" * 20,
        "a byte-order mark": "\ufeff" + PROSE,
        "escape characters": "\x1b[31m" * 20,
        "emoji": "\U0001f600" * 40,
        "one line of 100,000 letters": "x" * 100_000,
        "the names of special tokens": "<pad></s><unk>" * 20,
    }
    for told, content in maybe.items():
        yield read(ANY, told, content)


def odd_ggufs(rng: random.Random) -> Iterator[Case]:
    """Files called .gguf that are none, or torn."""
    start = b"GGUF" + (3).to_bytes(4, "little")
    contents = {
        "nothing": b"",
        "text": b"GGUF is a format",
        "its magic alone": b"GGUF",
        "of version 99": b"GGUF" + (99).to_bytes(4, "little") + bytes(16),
        "torn in its counts": start + bytes(7),
        "no tensors": start + bytes(16),
        "of 2^63 tensors": start + b"\xff" * 8 + bytes(8),
        "of a name of 2^60 letters": start + (1).to_bytes(8, "little") * 2 + (2**60).to_bytes(8, "little"),
        "noise": start + bytes(rng.randrange(256) for _ in range(500)),
        "a zip file": b"PK\x03\x04" + bytes(100),
    }
    for told, content in contents.items():
        for command in rng.sample(["trace", "heads", "retrieval", "spans"], 2):
            positional = ["torn.gguf", "after"] if command == "spans" else ["torn.gguf"]
            yield case(command, MUST_REFUSE, f"GGUF file: {told}", put("torn.gguf", content), positional=positional)
    yield case("trace", MUST_REFUSE, "GGUF file: a folder", folder("torn.gguf"), positional=["torn.gguf"])
    yield case("heads", MUST_REFUSE, "GGUF file: not there", positional=["torn.gguf"])


TRIAL_KEYS = ("task", "seq_len", "distance", "seed", "trial", "tokens_sha256", "model", "needle_distance", "accuracy",
              "answer_logprob_nats", "references", "written")  # fmt: skip


def kept_trials(rng: random.Random) -> Iterator[Case]:
    """What lies where retrieval keeps its trials while they are done."""
    file = "run.trials.jsonl"
    never: dict[str, str | bytes] = {
        "notes of mine": "precious\n",
        "a list": "[]\n",
        "a number": "5\n",
        "an object of other keys": '{"a": 1}\n',
        "no UTF-8": b"\xff\xfe\n",
        "brackets": "[" * 100_000 + "\n",
        "a trial of another model": json.dumps(dict.fromkeys(TRIAL_KEYS)) + "\n",
    }
    for told, content in never.items():
        yield case("retrieval", MUST_REFUSE, f"kept trials: {told}", put(file, content))
    yield case("retrieval", MUST_REFUSE, "kept trials: a folder", folder(file))
    yield case("retrieval", MUST_REFUSE, "kept trials: a symlink loop", loop(file))
    yield case("retrieval", MUST_REFUSE, "kept trials: a symlink to nowhere", link(file, "nowhere"))
    yield case("retrieval", SAME, "kept trials: nothing", put(file, ""), replaces=file)
    yield case("retrieval", SAME, "kept trials: of another run", put("other.trials.jsonl", "precious\n"))


# Paths of models


def model_paths(rng: random.Random) -> Iterator[Case]:
    """Other ways to say where a model lies, and ways to say where none does."""
    same = {
        "a slash at the end": "model/",
        "a dot before": "./model",
        "two dots inside": "model/../model",
        "a symlink": "linked",
        "a symlink to a symlink": "linked2",
        "two slashes": ".//model",
    }
    steps = (link("linked", "model"), link("linked2", "linked"))
    for told, path in same.items():
        yield case("trace", SAME, f"model by {told}", *steps, positional=[path])
        if told in ("a slash at the end", "a symlink"):
            yield case("retrieval", SAME, f"model by {told}", *steps, positional=[path])
            yield case("spans", SAME, f"model by {told}", *steps, positional=[path, "after"])
    yield case("trace", SAME, "model by its absolute path", positional=["{work}/model"])
    yield case("trace", SAME, "model whose name is odd", move("model", "mo del\n%s{}é"), positional=["mo del\n%s{}é"])
    yield case("trace", SAME, "model whose name begins with a dash", move("model", "-m"), positional=["./-m"])
    yield case(
        "trace",
        SAME,
        "model whose name looks like a hub id's",
        folder("org"),
        move("model", "org/name"),
        positional=["org/name"],
    )
    yield case("trace", ANY, "model whose name is no UTF-8", move("model", "mod\udcff"), positional=["mod\udcff"])
    yield case(
        "spans", ANY, "model whose name is no UTF-8", move("after", "aft\udcff"), positional=["model", "aft\udcff"]
    )
    absent = {
        "./absent": "no folder",
        "/absent": "no folder",
        "model/absent": "no folder",
        "../absent": "no folder",
        "model/config.json": "",
        "absent": "",
        "absent/absent": "",
        "a/b/c": "no folder",
        "~/absent": "no folder",
        "": "",
        " ": "",
        ".": "",
        "..": "",
        "loop": "",
        "dangling": "",
        "empty": "",
        "\udcff": "",
        "\x1b[31m": "",
        "x" * 5000: "",
        "http://example.com/x": "",
        "org/name@main": "",
        "-5": "",
    }
    steps = (loop("loop"), link("dangling", "nowhere"), folder("empty"))
    for path, says in absent.items():
        told = f"model {path[:30]!a} is none"
        yield case("trace", MUST_REFUSE, told, *steps, positional=[path], says=says)
        command = rng.choice(["spans before", "spans after", "retrieval", "distill student", "distill teacher"])
        if path and path != "-5":
            yield with_model(command, MUST_REFUSE, told, steps, path, says=says)


def with_model(
    role: str, expectation: Expect, told: str, steps: Sequence[Step], path: str = "model", **more: Any
) -> Case:
    """The case of a command that reads the model at `path` in a role."""
    command, _, part = role.partition(" ")
    if command == "distill":
        steps = (*steps, toml_file({**CONFIG, "student": "after", "teacher": "after", part: path}))
        return case("distill", expectation, f"{role}: {told}", *steps, needs=["after"], **{**more, "like": role})
    if command == "spans":
        sides = (path, "after") if part == "before" else ("after", path)
        return case("spans", expectation, f"{role}: {told}", *steps, positional=sides, **{**more, "like": role})
    return case(command, expectation, told, *steps, positional=[path], **more)


ROLES = ("trace", "spans before", "spans after", "retrieval", "distill student", "distill teacher")


def some_roles(rng: random.Random, count: int) -> list[str]:
    """Mostly what runs fast."""
    return list(dict.fromkeys(rng.choices(ROLES, weights=(5, 2, 2, 3, 1, 1), k=count)))


# Configurations of checkpoints

CONFIG_JSON = "model/config.json"
OTHER_TYPES = (
    "gpt2 mamba t5 bert lama gpt_neox llama4 clip whisper gemma2 mixtral falcon bloom opt qwen2 deepseek_v3 rwkv "
    "encoder-decoder"
)
STRUCTURE = {
    "num_hidden_layers": (0, 1, 3, -1, None, "two", 1.5, [], {}, True, ""),
    "hidden_size": (0, 15, 17, -16, None, "16px", 1.5, [16], HUGE, ""),
    "intermediate_size": (0, 23, 25, -1, None, "x", [24], 1e300),
    "vocab_size": (0, 63, 65, -1, None, "x", [64], HUGE, NAN),
    "num_attention_heads": (0, 1, 3, -2, None, "x", [2], 10**6, 7),
    "num_key_value_heads": (0, 2, 3, -1, "x", [1], 5),
    "head_dim": (0, 7, 4, 16, -8, "x", [8], 10**9, 1),
    "model_type": ("", None, 5, [], *OTHER_TYPES.split()),
    "hidden_act": ("nonsense", None, 5, [], "", {}),
    "dtype": ("int8", "nonsense", "complex64", "bool", 5, [], "float8_e4m3fn", "__class__"),
    "quantization_config": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "nonsense"},
    ),
}
LOOSE = {
    "quantization_config": ({"quant_method": "fp8"},),  # read as it is, or dequantised
    "max_position_embeddings": (0, -1, None, "x", HUGE, 1e300, [], 1, True),
    "rms_norm_eps": (0, -1, None, "x", NAN, INF, 1e300, []),
    "attention_bias": ("x", None, 5, []),
    "attention_dropout": ("x", -1, 2, None, NAN, []),
    "mlp_bias": ("x", None, 5),
    "tie_word_embeddings": ("x", None, True, []),
    "initializer_range": ("x", -1, None, NAN),
    "architectures": (["Nonsense"], "LlamaForCausalLM", None, [], {}, ["GPT2LMHeadModel"]),
    "bos_token_id": (-1, "x", 10**9, [1, 2], None),
    "eos_token_id": (-1, "x", [], 10**9),
    "pad_token_id": (-1, 64, 10**9, "x", None, []),
    "layer_types": (["full_attention"], [], "x", ["sliding_attention", "full_attention"], [None, None], 5),
    "auto_map": ({"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}, "x", []),
    "attn_implementation": ("nonsense", "flash_attention_2", 5),
    "_attn_implementation": ("nonsense", "flash_attention_2", 5),
    "is_encoder_decoder": (True, "x"),
    "torchscript": (True,),
    "return_dict": (False,),
    "output_attentions": (True,),
    "output_hidden_states": (True,),
    "pruned_heads": ({"0": [0]}, "x"),
    "chunk_size_feed_forward": (3, -1),
    "problem_type": ("nonsense",),
    "num_labels": (-1, "x"),
    "id2label": ("x", [1]),
    "pretraining_tp": (2, "x"),
    "sliding_window": (1, 0, -1, "x"),
    "attribute_map": ({"vocab_size": "nothing"},),
    "text_config": ({"vocab_size": 3}, "x"),
    "__class__": ("x",),
    "to_dict": (5,),
    "__dict__": ({},),
}
HARMLESS: dict[str, Any] = {
    "comment": "mine",
    "use_cache": False,
    "transformers_version": "99.0.0",
    "_name_or_path": "/nowhere",
    "license": {"name": "x", "of": [1, 2]},
    "é\n": None,
    "initializer_range": 0.5,
    "task_specific_params": None,
}
BAD_THETAS = (0, -1, NAN, INF, "10000", None, [], {}, True, HUGE**40)
ODD_ROPES = (
    *({"rope_type": "default", "rope_theta": theta} for theta in BAD_THETAS[:-2]),
    {"rope_type": "spiral", "rope_theta": 1e4},
    {"rope_type": 5, "rope_theta": 1e4},
    {"rope_type": ["default"], "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": NAN},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"},
    {"rope_type": "linear", "rope_theta": 1e4},
    {"rope_type": "yarn", "rope_theta": 1e4},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": NAN, "original_max_position_embeddings": 16},
    {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0],
        "long_factor": [2.0, 3.0],
    },
    {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": "x",
        "long_factor": None,
    },
    {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
    "x",
    [],
    5,
)
EDGE_ROPES = (
    None,
    {},
    {"rope_type": "default"},
    {"rope_theta": 1e4},
    {"rope_type": None, "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": True},
    {"rope_type": "default", "rope_theta": 1e300},
    {"rope_type": "default", "rope_theta": 1e-300},
    {"rope_type": "default", "rope_theta": 1},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": -1},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": "x"},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e300},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0.5, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 0, "beta_slow": 0},
    {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
    },
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    {"rope_type": "default", "rope_theta": 1e4, "nonsense": 5},
)


def odd_configs(rng: random.Random) -> Iterator[Case]:
    """config.json with an entry that does not fit the weights, or fits nothing."""
    for key, values in STRUCTURE.items():
        for value in rng.sample(values, min(len(values), 12 if key == "model_type" else 6)):
            for role in some_roles(rng, 1):
                yield with_model(
                    role,
                    MUST_REFUSE,
                    f"config.json with {key} = {short(value)}",
                    [set_keys(CONFIG_JSON, **{key: value})],
                )
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "model_type",
        "vocab_size",
        "rope_parameters",
        "head_dim",
        "num_key_value_heads",
        "intermediate_size",
        "max_position_embeddings",
        "dtype",
    ):
        yield with_model(rng.choice(ROLES[:4]), ANY, f"config.json without {key}", [drop_key(CONFIG_JSON, key)])
    for key, values in LOOSE.items():
        for value in rng.sample(values, min(len(values), 3)):
            yield with_model(
                rng.choice(ROLES[:4]),
                ANY,
                f"config.json with {key} = {short(value)}",
                [set_keys(CONFIG_JSON, **{key: value})],
            )
    for value in (0, -1, "x", 1.5, [], {}):
        yield case(
            "spans",
            MUST_REFUSE,
            f"spans after: max_position_embeddings = {short(value)}, no --long",
            set_keys("after/config.json", max_position_embeddings=value),
            options=on(short=None, long=None),
        )
    for value in (HUGE, 10**9):
        yield case(
            "spans",
            ANY,
            f"spans after: max_position_embeddings = {short(value)}, no --long",
            set_keys("after/config.json", max_position_embeddings=value),
            options=on(short=None, long=None),
        )
    yield case(
        "trace",
        MUST_REFUSE,
        f"config.json with num_hidden_layers = {10**9}",
        set_keys(CONFIG_JSON, num_hidden_layers=10**9),
    )
    yield case(
        "spans",
        MUST_REFUSE,
        f"config.json with num_hidden_layers = {10**9}",
        set_keys(CONFIG_JSON, num_hidden_layers=10**9),
    )
    yield case(
        "trace",
        MUST_REFUSE,
        "a model type of its own, with code in the folder",
        set_keys(CONFIG_JSON, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        put("model/evil.py", "open('executed', 'w').close()\n"),
    )


def odd_ropes(rng: random.Random) -> Iterator[Case]:
    """config.json with rope parameters that are none, or strange."""
    for rope in ODD_ROPES:
        for role in some_roles(rng, 1):
            given = ANY if role == "distill student" else MUST_REFUSE  # each phase has a theta of its own
            yield with_model(
                role, given, f"rope_parameters = {short(rope)}", [set_keys(CONFIG_JSON, rope_parameters=rope)]
            )
    for rope in EDGE_ROPES:
        yield with_model(
            rng.choice(ROLES[:4]),
            ANY,
            f"rope_parameters = {short(rope)}",
            [set_keys(CONFIG_JSON, rope_parameters=rope)],
        )
    for theta in (0, NAN, "x", -1):
        yield case(
            "trace", ANY, f"rope_theta = {short(theta)} beside rope_parameters", set_keys(CONFIG_JSON, rope_theta=theta)
        )
        yield case(
            "trace",
            ANY,
            f"--sweep theta with rope_theta {short(theta)}",
            set_keys(CONFIG_JSON, rope_parameters={"rope_type": "default", "rope_theta": theta}),
            options=on(sweep="theta", shift=None, side=None),
        )
    for scaling in ({"type": "linear", "factor": 2.0}, {"type": "nonsense"}, "x", {"rope_type": "yarn", "factor": 0}):
        yield case(
            "trace",
            ANY,
            f"old rope_scaling = {short(scaling)}",
            drop_key(CONFIG_JSON, "rope_parameters"),
            set_keys(CONFIG_JSON, rope_scaling=scaling, rope_theta=1e4),
        )


NOT_JSON: dict[str, bytes] = {
    "nothing in it": b"",
    "half a table": b'{"model_type": "llama", ',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a word": b'"llama"',
    "NaN": b"NaN",
    "an empty table": b"{}",
    "no UTF-8": b'{"model_type": "\xff\xfe"}',
    "100,000 brackets": b"[" * 100_000,
    "100,000 tables in each other": b'{"a":' * 100_000,
    "zeros": b"\0" * 100,
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "a number of 5,000 digits": b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}",
}


def broken_files(file: str, rng: random.Random, count: int | None = None) -> Iterator[tuple[str, Step]]:
    """Steps that leave no file of JSON in its place, each with its name."""
    contents = [(f"{file} is {told}", put(file, content)) for told, content in NOT_JSON.items()]
    places = [(f"{file} is a folder", folder(file)), (f"{file} is a symlink loop", loop(file))]
    places += [(f"{file} is gone", remove(file)), (f"{file} leads nowhere", link(file, "nowhere"))]
    everything = contents + places
    yield from everything if count is None else rng.sample(everything, count)


def broken_configs(rng: random.Random) -> Iterator[Case]:
    """config.json that is no JSON or no file, generation_config.json alike, and changes that mean nothing."""
    for told, step in broken_files(CONFIG_JSON, rng):
        yield with_model(rng.choice(ROLES[:4]), MUST_REFUSE, told, [step])
    for told, step in broken_files("model/generation_config.json", rng, 9):
        yield with_model(rng.choice(ROLES[:2]), SAME_OR_REFUSE, told, [step])
    for key, value in (
        ("max_length", "x"),
        ("temperature", -1),
        ("nonsense", 5),
        ("eos_token_id", {}),
        ("top_k", 1e300),
    ):
        yield case(
            "trace",
            SAME_OR_REFUSE,
            f"generation_config.json with {key} = {value}",
            set_keys("model/generation_config.json", **{key: value}),
        )
    for key, value in HARMLESS.items():
        role = rng.choice(ROLES[:4])
        yield with_model(
            role, SAME, f"config.json with {key!r} = {short(value)}", [set_keys(CONFIG_JSON, **{key: value})]
        )
    yield case(
        "trace",
        SAME,
        "config.json in another order",
        edit(CONFIG_JSON, lambda table: dict(sorted(table.items(), reverse=True))),
    )
    yield case(
        "trace",
        SAME_OR_REFUSE,
        "config.json with a byte-order mark",
        rewrite(CONFIG_JSON, lambda text: b"\xef\xbb\xbf" + text),
    )
    yield case(
        "trace",
        SAME_OR_REFUSE,
        "config.json says hidden_size twice",
        rewrite(CONFIG_JSON, lambda text: text.rstrip()[:-1] + b', "hidden_size": 16}'),
    )
    yield case(
        "trace",
        MUST_REFUSE,
        "config.json says hidden_size twice, differently",
        rewrite(CONFIG_JSON, lambda text: text.rstrip()[:-1] + b', "hidden_size": 32}'),
    )


def short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 90 else f"{told[:60]}... ({len(told)} characters)"


def each(table: dict[Any, Sequence[Any]]) -> Iterator[tuple[Any, Any]]:
    """Every key with every one of its values."""
    return ((key, value) for key, values in table.items() for value in values)


# Weights


def change_one(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The tensors of a file with the first one whose name holds `name` changed."""

    def changed(tensors: dict[str, Any]) -> dict[str, Any]:
        found = next(key for key in sorted(tensors) if name in key)
        return {**tensors, found: change(tensors[found]).contiguous()}

    return changed


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    first = sorted(tensors)[0]
    return {f"{key}_" if key == first else key: value for key, value in tensors.items()}


def with_extra(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {**tensors, name: torch.ones(4, 4)}


def without_first(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key: tensors[key] for key in sorted(tensors)[1:]}


def in_the_index(name: str, shard: str = SHARD) -> Step:
    """A tensor that the index says is in a shard."""
    return edit(f"model/{INDEX}", lambda index: index["weight_map"].update({name: shard}))


def one_value(number: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """One entry of one matrix is that number."""

    def change(tensor: Any) -> Any:
        changed = tensor.clone()
        changed.view(-1)[7] = number
        return changed

    return change_one("weight", change)


def resharded(parts: int, seed: int) -> Step:
    """The same weights in other files; one part has no index."""

    def step(work: Path) -> None:
        tensors = all_tensors(work / "model")
        names = random.Random(seed).sample(sorted(tensors), len(tensors))
        (work / "model" / INDEX).unlink()
        if parts == 1:
            save_file({name: tensors[name] for name in names}, work / "model" / "model.safetensors", {"format": "pt"})
            return
        where = {name: f"model-{number % parts:05}.safetensors" for number, name in enumerate(names)}
        for shard in set(where.values()):
            inside = {name: tensors[name] for name in names if where[name] == shard}
            save_file(inside, work / "model" / shard, {"format": "pt"})
        (work / "model" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))

    return step


def all_tensors(place: Path, keep: bool = False) -> dict[str, Any]:
    """The tensors of a checkpoint's shards, which are removed."""
    tensors: dict[str, Any] = {}
    for shard in sorted(place.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(shard).items()}
        if not keep:
            shard.unlink()
    return tensors


def stored_as(dtype: Any, every: bool = False) -> Step:
    """One matrix, or every tensor, of the model in another type."""

    def step(work: Path) -> None:
        for shard in sorted((work / "model").glob("*.safetensors")) if every else [work / "model" / SHARD]:
            tensors = load_file(shard)
            chosen = list(tensors) if every else [next(key for key in sorted(tensors) if tensors[key].ndim == 2)]
            save_file({key: x.to(dtype) if key in chosen else x for key, x in tensors.items()}, shard, {"format": "pt"})

    return step


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A safetensors file with the JSON of its header changed."""

    def changed(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + size])
        new = change(table)
        told = json.dumps(table if new is None else new).encode()
        return len(told).to_bytes(8, "little") + told + content[8 + size :]

    return changed


def first_entry(table: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in table.items() if name != "__metadata__")


FLOATS = (torch.float64, torch.float16, torch.bfloat16)
NO_FLOATS = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
SHARD_FILE = f"model/{SHARD}"
INDEX_FILE = f"model/{INDEX}"


def broken_shards(rng: random.Random) -> Iterator[Case]:
    """Weight files that are cut, changed, exchanged or not there."""

    def each(told: str, expectation: Expect, *steps: Step, roles: int = 1) -> Iterator[Case]:
        for role in some_roles(rng, roles):
            yield with_model(role, expectation, told, steps)

    for share in (0, 0.0005, 0.01, 0.3, 0.9, 0.999):
        yield from each(f"shard cut to {share}", MUST_REFUSE, cut(SHARD_FILE, share), roles=2)
    for _ in range(12):
        place, bit = rng.random() * 0.12, rng.randrange(8)
        yield from each(f"shard with bit {bit} flipped at {place:.3f} (header)", ANY, flip(SHARD_FILE, place, bit))
    for _ in range(10):
        place, bit = 0.4 + rng.random() * 0.6, rng.randrange(8)
        yield from each(f"shard with bit {bit} flipped at {place:.3f} (data)", ANY, flip(SHARD_FILE, place, bit))
    for told, content in (
        ("zeros", b"\0" * 500),
        ("text", b"hello" * 50),
        ("8 x 0xff", b"\xff" * 8),
        ("a pickle", b"\x80\x04."),
    ):
        yield from each(f"shard is {told}", MUST_REFUSE, put(SHARD_FILE, content), roles=2)
    yield from each(
        "shard with bytes behind its end", SAME_OR_REFUSE, rewrite(SHARD_FILE, lambda x: x + b"\0" * 64), roles=2
    )
    yield from each("shard is a folder", MUST_REFUSE, folder(SHARD_FILE), roles=3)
    yield from each("shard is a symlink loop", MUST_REFUSE, loop(SHARD_FILE), roles=3)
    yield from each("shard is gone", MUST_REFUSE, remove(SHARD_FILE), roles=2)
    yield from each("shard leads nowhere", MUST_REFUSE, link(SHARD_FILE, "nowhere"), roles=2)
    swapped = (move(SHARD_FILE, "x"), move(f"model/{other_shard(1)}", SHARD_FILE), move("x", f"model/{other_shard(1)}"))
    yield from each("two shards exchanged", SAME_OR_REFUSE, *swapped, roles=4)
    yield from each("a shard is a copy of another", MUST_REFUSE, copy(f"model/{other_shard(1)}", SHARD_FILE), roles=4)
    yield from each("a shard renamed", MUST_REFUSE, move(SHARD_FILE, "model/weights.safetensors"), roles=2)
    for told, change in (
        ("an entry beyond the end", lambda table: first_entry(table).update(data_offsets=[0, 10**12])),
        ("an entry that ends before it begins", lambda table: first_entry(table).update(data_offsets=[64, 0])),
        ("a negative shape", lambda table: first_entry(table).update(shape=[-4, -4])),
        ("a huge shape", lambda table: first_entry(table).update(shape=[2**40, 2**40])),
        ("a dtype that is none", lambda table: first_entry(table).update(dtype="F13")),
        ("no table", lambda table: []),
        ("metadata that is no text", lambda table: table.update(__metadata__={"format": 5})),
        ("the format of another framework", lambda table: table.update(__metadata__={"format": "mlx2"})),
    ):
        expectation = SAME_OR_REFUSE if "format" in told else MUST_REFUSE
        yield from each(f"shard whose header has {told}", expectation, rewrite(SHARD_FILE, header(change)), roles=2)
    yield from each(
        "shard without metadata",
        SAME_OR_REFUSE,
        rewrite(SHARD_FILE, header(lambda table: table.pop("__metadata__", None) and None)),
        roles=3,
    )


def other_shard(number: int) -> str:
    return SHARD.replace("00002-of", f"{number:05}-of")


def odd_indices(rng: random.Random) -> Iterator[Case]:
    """An index of shards that is broken, or names what it must not."""

    def each(told: str, expectation: Expect, *steps: Step, roles: int = 2) -> Iterator[Case]:
        for role in some_roles(rng, roles):
            yield with_model(role, expectation, f"index: {told}", steps)

    for told, step in broken_files(INDEX_FILE, rng, 9):
        yield from each(told.replace(INDEX_FILE, "it"), MUST_REFUSE, step, roles=1)

    def everywhere(shard: str) -> Step:
        return edit(
            INDEX_FILE,
            lambda index: index["weight_map"].update(
                {name: shard for name, holder in index["weight_map"].items() if holder == SHARD}
            ),
        )

    out_of_place = {
        "names a .bin file": ("pytorch_model.bin", put("model/pytorch_model.bin", b"\x80\x04.")),
        "names a .bin file that is not there": ("pytorch_model.bin", remove("nothing")),
        "names a ../ path": (f"../{SHARD}", move(SHARD_FILE, SHARD)),
        "names an absolute path": ("/etc/hostname", remove("nothing")),
        "names a shard in a folder": (f"inside/{SHARD}", copy("model", "model/inside")),
        "names a path of nothing": ("", remove("nothing")),
        "names itself": (INDEX, remove("nothing")),
        "names config.json": ("config.json", remove("nothing")),
        "names a safetensors file of another ending": ("weights.bin", move(SHARD_FILE, "model/weights.bin")),
    }
    for told, (shard, step) in out_of_place.items():
        expectation = SAME_OR_REFUSE if "in a folder" in told else MUST_REFUSE
        yield from each(told, expectation, step, everywhere(shard))
    for value in (None, 5, [], {}, True):
        yield from each(f"a tensor is in shard {value!r}", MUST_REFUSE, everywhere(value))  # type: ignore[arg-type]
    for value in (None, 5, [], "x", {}):
        yield from each(f"weight_map is {value!r}", MUST_REFUSE, set_keys(INDEX_FILE, weight_map=value), roles=1)
    for value in (None, 5, [], "x", {"total_size": -1}, {"total_size": "x"}):
        yield from each(f"metadata is {value!r}", SAME_OR_REFUSE, set_keys(INDEX_FILE, metadata=value), roles=1)
    yield from each("no metadata", SAME_OR_REFUSE, drop_key(INDEX_FILE, "metadata"))
    yield from each(
        "lacks a tensor that its shard has",
        SAME_OR_REFUSE,
        edit(INDEX_FILE, lambda index: index["weight_map"].pop(sorted(index["weight_map"])[0]) and None),
        roles=3,
    )
    yield from each("promises a tensor that no shard has", MUST_REFUSE, in_the_index("model.nothing.weight"), roles=3)
    yield from each("says a tensor twice, alike", SAME_OR_REFUSE, rewrite(INDEX_FILE, said_twice(SHARD)))
    yield from each(
        "beside a model.safetensors that is broken", MUST_REFUSE, put("model/model.safetensors", b""), roles=2
    )


def said_twice(shard: str) -> Callable[[bytes], bytes]:
    """The index's JSON, with its first tensor of that shard said once more."""

    def change(content: bytes) -> bytes:
        name = next(key for key, holder in json.loads(content)["weight_map"].items() if holder == shard)
        return content.replace(b'"weight_map": {', b'"weight_map": {' + f'"{name}": "{shard}",'.encode())

    return change


def odd_tensors(rng: random.Random) -> Iterator[Case]:
    """Whole files of tensors that are not what the config describes, or not numbers."""

    def each(told: str, expectation: Expect, *steps: Step, roles: int = 2) -> Iterator[Case]:
        for role in some_roles(rng, roles):
            yield with_model(role, expectation, told, steps)

    for number in (NAN, INF, -INF):
        for role in ROLES:
            yield with_model(
                role, MUST_REFUSE, f"one weight is {number}", [edit_weights(SHARD_FILE, one_value(number))]
            )
    for number in (1e38, -1e38, 0.0, 1e-44):
        yield from each(f"one weight is {number}", ANY, edit_weights(SHARD_FILE, one_value(number)), roles=1)
    yield from each(
        "all of a shard is 0", ANY, edit_weights(SHARD_FILE, lambda all: {k: 0 * x for k, x in all.items()}), roles=3
    )
    yield from each(
        "all of a shard is 1e38",
        ANY,
        edit_weights(SHARD_FILE, lambda all: {k: torch.full_like(x, 1e38) for k, x in all.items()}),
        roles=3,
    )
    for dtype in NO_FLOATS:
        yield from each(f"one matrix stored as {dtype}", MUST_REFUSE, stored_as(dtype), roles=3)
        yield from each(f"every tensor stored as {dtype}", MUST_REFUSE, stored_as(dtype, every=True))
    for dtype in FLOATS:
        yield from each(f"one matrix stored as {dtype}", ANY, stored_as(dtype))
        yield from each(f"every tensor stored as {dtype}", ANY, stored_as(dtype, every=True))
    extras = (
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "classifier.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "é\n",
        "model.layers.0.mlp.experts.0.w1.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "",
    )
    for name in extras:
        steps = (edit_weights(SHARD_FILE, with_extra(name)), in_the_index(name))
        yield from each(f"a tensor {name!r} that the config does not use", MUST_REFUSE, *steps, roles=2)
    yield from each(
        "a tensor that neither config nor index knows",
        MUST_REFUSE,
        edit_weights(SHARD_FILE, with_extra("model.extra")),
        roles=3,
    )
    yield from each("a required tensor renamed", MUST_REFUSE, edit_weights(SHARD_FILE, renamed), roles=3)
    yield from each("a required tensor left out", MUST_REFUSE, edit_weights(SHARD_FILE, without_first), roles=3)
    yield from each("a tensor in two shards, alike", SAME_OR_REFUSE, duplicate(0.0), roles=3)
    yield from each("a tensor in two shards, different", MUST_REFUSE, duplicate(1.0), roles=4)
    for told, change in (
        ("transposed", lambda x: x.T),
        ("one row short", lambda x: x[:-1]),
        ("flat", lambda x: x.flatten()),
        ("of no rows", lambda x: x[:0]),
        ("one number", lambda x: x.flatten()[0].clone()),
        ("of one more dimension", lambda x: x[None]),
    ):
        yield from each(f"a matrix {told}", MUST_REFUSE, edit_weights(SHARD_FILE, change_one("down_proj", change)))


def duplicate(shift: float) -> Step:
    """The first tensor of a shard in another one too, moved by `shift`; the index knows of the first one."""

    def step(work: Path) -> None:
        name, tensor = min(load_file(work / SHARD_FILE).items())
        edit_weights(f"model/{other_shard(3)}", lambda tensors: {**tensors, name: tensor + shift})(work)

    return step


STRAY = {
    "a README": put("model/README.md", "# mine\n"),
    "a .DS_Store": put("model/.DS_Store", b"\0\1\2"),
    "a .git folder": put("model/.git/HEAD", "ref: refs/heads/main\n"),
    "a folder original/ with weights": put("model/original/consolidated.00.pth", b"\x80\x04."),
    "a pytorch_model.bin": put("model/pytorch_model.bin", b"\x80\x04."),
    "an optimizer.pt": put("model/optimizer.pt", b"\x80\x04."),
    "another safetensors file": put("model/adapter.safetensors", b""),
    "a symlink loop": loop("model/loop"),
    "a file of no UTF-8 name": put("model/x\udcff", b"x"),
}
SIDE_FILES = {
    "adapter_config.json": ("{}", '{"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}', "x"),
    "chat_template.jinja": ("{% for %}", "\0"),
    "special_tokens_map.json": ("x", "[]"),
    "preprocessor_config.json": ("x", "[]"),
    "tf_model.h5": ("x",),
    "quantize_config.json": ('{"bits": 4}', "x"),
    "modeling_llama.py": ("open('executed', 'w')",),
    "config.1.0.0.json": ('{"model_type": "gpt2"}',),
}


def harmless_weights(rng: random.Random) -> Iterator[Case]:
    """The same weights in other files, and other files beside them."""
    for parts in (1, 2, 5, 11):
        for role in some_roles(rng, 2):
            yield with_model(role, SAME, f"weights in {parts} files", [resharded(parts, parts)], rounding=True)
    yield with_model(
        "trace",
        SAME,
        "a shard is a symlink to itself elsewhere",
        [move(SHARD_FILE, "elsewhere"), link(SHARD_FILE, "../elsewhere")],
    )
    for told, step in STRAY.items():
        yield with_model(rng.choice(ROLES[:4]), SAME, f"beside the weights {told}", [step])
    for file, contents in SIDE_FILES.items():
        for content in contents:
            yield with_model(
                rng.choice(ROLES[:4]),
                SAME_OR_REFUSE,
                f"beside the weights {file}: {content}",
                [put(f"model/{file}", content)],
            )


# Tokenizers and files of tokens


def odd_tokenizers(rng: random.Random) -> Iterator[Case]:
    """Files of a tokenizer that are broken, for tasks in text and for students and teachers."""

    def passkey(expectation: Expect, told: str, *steps: Step) -> Case:
        return case(
            "retrieval",
            expectation,
            f"tokenizer: {told}",
            *steps,
            options={**TEXT, "--keys": None, "--values": None},
            positional=["reader"],
            needs=["reader"],
            like="passkey",
        )

    file = "reader/tokenizer_config.json"
    yield passkey(SAME, "as it is")
    for told, step in broken_files(file, rng):
        expectation = SAME_OR_REFUSE if told.endswith(("empty table", "is gone", "leads nowhere")) else MUST_REFUSE
        yield passkey(expectation, told, step)
    for value in ("NoSuchTokenizer", "GPT2Tokenizer", "LlamaTokenizer", None, 5, [], "", "../evil", "__import__"):
        yield passkey(SAME_OR_REFUSE, f"tokenizer_class = {value!r}", set_keys(file, tokenizer_class=value))
    odd = {
        "extra_ids": (-1, "x", 100, None),
        "added_tokens_decoder": ({"x": {}}, {"0": 5}, {"-1": {"content": "a"}}, [], {"9999": {"content": "passkey"}}),
        "eos_token": (5, None, "", {"content": 5}),
        "pad_token": (5, [], None),
        "model_max_length": (0, -1, "x", 1),
        "auto_map": ({"AutoTokenizer": ["evil.Evil", None]}, "x"),
        "chat_template": (5, "{% bad"),
        "additional_special_tokens": ("x", [5], {}),
    }
    for key, values in odd.items():
        for value in rng.sample(values, min(2, len(values))):
            yield passkey(ANY, f"{key} = {short(value)}", set_keys(file, **{key: value}))
    for told, content in (
        ("nothing", b""),
        ("text", b"x"),
        ("{}", b"{}"),
        ("no UTF-8", b"\xff\xfe"),
        ("brackets", b"[" * 10**5),
    ):
        yield passkey(ANY, f"a tokenizer.json of {told} beside it", put("reader/tokenizer.json", content))
        yield passkey(ANY, f"a tokenizer.json of {told} alone", put("reader/tokenizer.json", content), remove(file))
    yield passkey(ANY, "a tokenizer.model of text beside it", put("reader/tokenizer.model", "x"))
    yield passkey(MUST_REFUSE, "a tokenizer.model of text alone", put("reader/tokenizer.model", "x"), remove(file))
    yield passkey(MUST_REFUSE, "none", remove(file), remove("reader/special_tokens_map.json"))
    big = set_keys(
        file,
        added_tokens_decoder={
            "300": {
                "content": " ",
                "special": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
        },
    )
    yield passkey(MUST_REFUSE, "with an id that the vocabulary lacks", big)
    for told, step in broken_files("model/tokenizer_config.json", rng, 4):
        yield with_model(rng.choice(["distill student", "distill teacher"]), ANY, told, [step])


def odd_token_files(rng: random.Random) -> Iterator[Case]:
    """Files for --tokens: the same in another spelling, and what is no list of token ids."""

    def read(expectation: Expect, told: str, content: str | bytes, *, states: bool | None = None) -> Case:
        states = rng.random() < 0.15 if states is None else states
        options = {**(STATES_ON if states else {}), "--tokens": "docs.txt", "--document-length": None, "--window": None}
        command, like = ("spans", "spans tokens") if states else ("trace", "trace tokens")
        return case(command, expectation, f"tokens file: {told}", put("docs.txt", content), options=options, like=like)

    plain = "5 6 7 8\n\n9 10 11 12 13\n14 15\n"
    same = {
        "no newline at the end": plain.rstrip(),
        "CRLF": plain.replace("\n", "\r\n"),
        "tabs": plain.replace(" ", "\t"),
        "many blanks": plain.replace(" ", "   ").replace("\n", " \n\n  "),
        "zeros before": plain.replace("5 ", "0005 "),
    }
    for told, content in same.items():
        yield read(SAME, told, content)
    never: dict[str, str | bytes] = {
        "nothing": "",
        "blanks": " \n\t\n",
        "NUL bytes": b"\0" * 100,
        "binary": bytes(rng.randrange(256) for _ in range(500)),
        "UTF-16": plain.encode("utf-16"),
        "a negative id": "5 -6 7",
        "an id past the vocabulary": "5 64 7",
        "an id past 64 bits": f"5 {2**64} 7",
        "an id of 5,000 digits": "5 " + "9" * 5000,
        "a decimal": "5 6.0",
        "an exponent": "5 1e1",
        "a word": "5 six",
        "commas": "5,6,7",
        "JSON": "[[5, 6], [7]]",
        "hexadecimal": "0x5 0x6",
        "a line of 100,000 letters": "x" * 100_000,
        "escape characters": "\x1b[31m5",
        "nan": "5 nan",
    }
    for told, content in never.items():
        yield read(MUST_REFUSE, told, content)
        if told in ("nothing", "binary", "a negative id", "an id past 64 bits"):
            yield read(MUST_REFUSE, told, content, states=True)
    maybe: dict[str, str | bytes] = {
        "a byte-order mark": "\ufeff5 6 7",
        "digits of another script": "\u0665 \u0666",
        "underscores": "1_0 2_0",
        "a plus sign": "+5 6",
        "a line separator": "5 6\u20287 8",
        "a form feed": "5 6\x0c7 8",
        "a no-break space": "5\u00a06",
        "one id": "5",
        "one document of 200": " ".join(["5"] * 200),
        "200 documents of one": "5\n" * 200,
        "an old Mac's line ends": "5 6\r7 8",
    }
    for told, content in maybe.items():
        yield read(ANY, told, content)


# Runs that a report reads

TYPES = (None, 5, -1.5, "x", "", [], {}, [1], {"a": 1}, True, NAN, "<script>alert(1)</script>", "x" * 3000)


def odd_manifests(rng: random.Random) -> Iterator[Case]:
    """manifest.json with entries of other types, or none."""
    keys = (
        "run_id",
        "experiment",
        "status",
        "config",
        "argv",
        "packages",
        "git",
        "wall_s",
        "models",
        "python",
        "hardware",
    )
    needed = keys[:8]
    for key in keys:
        for value in rng.sample(TYPES, 4):
            expectation = MUST_REFUSE if key == "status" else ANY
            yield case(
                "report",
                expectation,
                f"manifest {key} = {short(value)}",
                set_keys("found/manifest.json", **{key: value}),
            )
        yield case(
            "report",
            MUST_REFUSE if key in needed else ANY,
            f"manifest without {key}",
            drop_key("found/manifest.json", key),
        )
    for value in ("running", "Complete", "complete ", "COMPLETE"):
        yield case("report", MUST_REFUSE, f"manifest status = {value!r}", set_keys("found/manifest.json", status=value))
    for told, value in (("no commit", {}), ("a commit that is no text", {"commit": 5, "dirty": "x"})):
        yield case("report", ANY, f"manifest git has {told}", set_keys("found/manifest.json", git=value))
    yield case(
        "report",
        ANY,
        "manifest packages hold lists",
        set_keys("found/manifest.json", packages={"torch": [1], "é": None}),
    )
    yield case("report", ANY, "manifest argv holds numbers", set_keys("found/manifest.json", argv=[1, None, []]))
    yield case("report", ANY, "manifest experiment is a path", set_keys("found/manifest.json", experiment="../../x"))
    yield case("report", ANY, "manifest wall_s is infinite", set_keys("found/manifest.json", wall_s=INF))
    for told, step in broken_files("found/manifest.json", rng):
        yield case("report", MUST_REFUSE, told, step)


def odd_metrics(rng: random.Random) -> Iterator[Case]:
    """A table cut, of other types, with other columns, or with strange values."""
    file = TABLE_OF["found"]

    def changed(run: str, expectation: Expect, told: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Case:
        return case(
            "report", expectation, f"metrics of {run}: {told}", edit_frame(run, change), positional=[run], needs=[run]
        )

    for share in (0, 0.01, 0.5, 0.99):
        yield case("report", MUST_REFUSE, f"metrics cut to {share}", cut(file, share))
    for told, step in (
        ("a folder", folder(file)),
        ("a symlink loop", loop(file)),
        ("gone", remove(file)),
        ("a CSV", put(file, "metric,value\nx,1\n")),
        ("zeros", put(file, b"\0" * 500)),
        ("PAR1 twice", put(file, b"PAR1PAR1")),
    ):
        yield case("report", MUST_REFUSE, f"metrics are {told}", step)
    for _ in range(8):
        place, bit = rng.random(), rng.randrange(8)
        yield case("report", ANY, f"metrics with bit {bit} flipped at {place:.3f}", flip(file, place, bit))
    for run in ("found", "traced"):
        yield changed(run, MUST_REFUSE, "an unknown column", lambda frame: frame.assign(extra=1))
        yield changed(run, MUST_REFUSE, "0 rows", lambda frame: frame.iloc[:0])
        yield changed(run, MUST_REFUSE, "no columns", lambda frame: frame[[]])
        yield changed(run, MUST_REFUSE, "`value` renamed", lambda frame: frame.rename(columns={"value": "values"}))
        yield changed(run, MUST_REFUSE, "`metric` renamed", lambda frame: frame.rename(columns={"metric": "Metric"}))
        for column in ("value", "seed", "distance", "position", "layer", "run_id", "delta_tokens"):
            yield changed(run, ANY, f"{column} is text", lambda frame, c=column: frame.assign(**{c: "x"}))
        for column in ("seed", "layer", "document", "distance"):
            yield changed(run, ANY, f"{column} is half a number", lambda frame, c=column: frame.assign(**{c: 0.5}))
            yield changed(run, ANY, f"{column} is huge", lambda frame, c=column: frame.assign(**{c: 2.0**70}))
        for number in (NAN, INF, -1.0, 0.0, 1e308):
            yield changed(run, ANY, f"every value is {number}", lambda frame, n=number: frame.assign(value=n))
        for column in rng.sample(
            ["metric", "arm", "site", "side", "model", "distance", "seq_len", "experiment", "run_id"], 4
        ):
            yield changed(run, ANY, f"{column} is null", lambda frame, c=column: frame.assign(**{c: None}))
            yield changed(
                run, ANY, f"{column} is dates", lambda frame, c=column: frame.assign(**{c: pd.Timestamp("2020")})
            )
        yield changed(run, ANY, "lists in `site`", lambda frame: frame.assign(site=[["a"]] * len(frame)))
        yield changed(run, ANY, "every row twice", lambda frame: pd.concat([frame, frame]))
        yield changed(run, ANY, "one row", lambda frame: frame.iloc[:1])
        yield changed(run, ANY, "rows in another order", lambda frame: frame.iloc[::-1])
        for column in ("low", "high", "model", "seed", "site", "layer"):
            yield changed(
                run, ANY, f"no column {column}", lambda frame, c=column: frame.drop(columns=c, errors="ignore")
            )
        yield changed(run, ANY, "a model of odd name", lambda frame: frame.assign(model="<b>é/\n" * 60))
    yield changed("traced", ANY, "blocks.x in `site`", lambda frame: frame.assign(site="blocks.x.hook_resid_post"))
    yield changed("traced", ANY, "a negative layer", lambda frame: frame.assign(layer=-1))
    yield changed("compared", ANY, "one row of a part", lambda frame: frame.iloc[::50])
    gone = remove("compared/tables/span_statistics.parquet")
    yield case("report", MUST_REFUSE, "no statistics", gone, positional=["compared"], needs=["compared"])
    for told, tables in (("are a list", []), ("are elsewhere", {"../../traced/tables/deltas": 1}), ("are null", None)):
        yield case("report", MUST_REFUSE, f"manifest tables {told}", set_keys("found/manifest.json", tables=tables))
    yield changed("compared", ANY, "pairs of no wavelength", lambda frame: frame.assign(wavelength=None))
    yield changed("trained", ANY, "no positions", lambda frame: frame.assign(position=None))


def odd_run_folders(rng: random.Random) -> Iterator[Case]:
    """What `report` is given in place of runs."""
    steps = (loop("loop"), folder("empty"), link("linked", "found"), put("file", "x"), link("dangling", "nowhere"))
    for path in (
        "loop",
        "empty",
        "file",
        "dangling",
        "absent",
        "",
        ".",
        "x" * 300,
        "\udcff",
        "model",
        "gallery",
        "found/..",
        "found/manifest.json",
        "stopped",
        "\x1b[31m",
    ):
        yield case(
            "report",
            MUST_REFUSE,
            f"run {path[:30]!a} is none",
            *steps,
            positional=[path],
            needs=["model", "gallery", "stopped"],
        )
        if rng.random() < 0.4:
            yield case(
                "report",
                MUST_REFUSE,
                f"a run and {path[:30]!a}, which is none",
                *steps,
                positional=["found", path],
                needs=["model", "gallery", "stopped"],
            )
    for paths in (
        ["linked"],
        ["found", "found"],
        ["found/", "./found"],
        ["found", "traced"],
        ["trained"],
        ["compared"],
    ):
        yield case("report", ANY, f"runs {paths}", *steps, positional=paths, needs=["traced", "trained", "compared"])


# Configurations of distill


def at(path: tuple[Any, ...], value: Any, table: dict[str, Any] | None = None) -> dict[str, Any]:
    """The plain table with one entry changed."""
    changed = json.loads(json.dumps(CONFIG if table is None else table))
    *outer, last = path
    inner = changed
    for key in outer:
        inner = inner[key] if isinstance(inner, list) else inner.setdefault(key, {})
    inner[last] = value
    return changed


PHASE = ("phases", 0)
COUNTS = ("window", "steps", "batch_tokens", "warmup", "accumulate")
BAD_ENTRIES = {
    "window": (HUGE,),
    "batch_tokens": (HUGE,),
    "accumulate": (HUGE,),
    "weight_decay": (-1, NAN, INF, "x"),
    "objective": ({"ce_weight": 1.0, "kd_weight": 0.0}, 5),
    "terms": (
        5,
        "x",
        [],
        [{}],
        [5],
        [{"kind": "nonsense"}],
        [{"kind": "cross_entropy", "weight": 0}],
        [{"kind": "cross_entropy", "weight": -1}],
        [{"kind": "cross_entropy", "weight": NAN}],
        [{"kind": "kd", "weight": INF}],
        [{"kind": "kd", "teacher": "nobody"}],
        [{"kind": "kd", "nonsense": 1}],
    ),
    "streams": (5, [], [{}], [{"data": STREAM, "window": 32, "share": 0}], [{"data": STREAM, "window": 7}]),
    "data": ({"kind": "nonsense"}, {}, [], "x"),
    "gate": (5, {}, "x"),
    "name": ("", "a/b", "..", "x" * 300, "é\n", 5, "-"),
    "masked": ("x", 2),
    "positions": ("x", "skipped"),
    "schedule": ("x", 5),
    "rope_parameters": ({}, "x"),
    "nonsense": (1,),
}
EDGE_ENTRIES = {
    "lr": (1e300, 1e-300, 1e30, True),
    "matrix_lr": (1e300, 1e30),
    "clip_norm": (1e300, 1e-300),
    "theta": (1e300, 1e-300, True),
    "weight_decay": (1e300, 0),
    "warmup": (HUGE - 1,),
    "target_window": (0, 8, HUGE - 1),
    "name": ("é", "a.b"),
    "masked": (True,),
    "teacher_masked": (True,),
    "positions": ("reset",),
}
BAD_DATA = {
    "distinct": ([4, 1], [0, 4], [1, 21], [], [1], [1, 2, 3], "x", [NAN, 1], [1, HUGE], -1),
    "document_length": (15, 1, 64, 7, HUGE),
    "keys": (HUGE,),
    "values": (HUGE,),
}
BAD_DIVERGENCES = {"temperature": (0, -1, NAN, INF, "x"), "top_k": (0, -1, 1.5, "x"), "kind": ("x", 5)}
EDGE_DIVERGENCES = (
    {},
    {"temperature": 1e300},
    {"temperature": 1e-300},
    {"kind": "reverse_kl", "top_k": HUGE - 1},
    {"kind": "jensen_shannon", "top_k": 1, "tail": False},
)
BAD_HIDDEN = (
    *({"sites": sites} for sites in ([], ["x"], ["blocks.9.hook_resid_post"], "ln_final.hook_out")),
    *({"weight": weight} for weight in (0, NAN)),
    {"kind": "x"},
)
GATE = {"window": 16, "distances": [4], "accuracy": 0.5, "every": 1, "trials": 2}
BAD_GATES = {
    "window": (0, 17, HUGE),
    "distances": ([], [3], [-2], [16], ["x"]),
    "every": (0,),
    "trials": (0,),
    "accuracy": (NAN, 2, -1, "x"),
    "seed": (-1, HUGE),
}
EDGE_GATES = {"accuracy": (0.0, 0.5, 1.0), "every": (HUGE - 1,), "window": (512,), "distances": ([4, 4],)}
BAD_RUNS = {
    "seed": (-1, HUGE, NAN, "x"),
    "device": ("", "x", 5),
    "dtype": ("float16", "", 5),
    "attn": ("x", "", 5, "flash_attention_2"),
    "phases": ([], {}, "x", [5], [[]]),
    "out": (5, [], ""),
    "student": (5, [], {}, "", "absent"),
    "teacher": (5, [], {}, "", "absent"),
    "nonsense": (1, {}),
}


def hidden_term(value: Any) -> Any:
    """A setting of the term that compares hidden states, as a term; what is no table stays as it is."""
    if not isinstance(value, dict):
        return value
    return {**{"distance" if key == "kind" else key: setting for key, setting in value.items()}, "kind": "hidden"}


def odd_distill_configs(rng: random.Random) -> Iterator[Case]:
    """A TOML file with one entry that is wrong, at its edge, missing or unknown."""

    def one(path: tuple[Any, ...], value: Any, expectation: Expect = MUST_REFUSE) -> Case:
        return case("distill", expectation, f"{'.'.join(map(str, path))} = {short(value)}", toml_file(at(path, value)))

    paths = [(*PHASE, key) for key in COUNTS] + [("log_every",), ("save_every",), ("keep",)]
    paths += [(*PHASE, "data", key) for key in ("document_length", "keys", "values")]
    for path in paths:
        for value in rng.sample([0, -1, NAN, INF, 1.5, "x", [], {}, -HUGE, ""], 4):
            yield one(path, value)
    for key in ("lr", "clip_norm", "matrix_lr", "theta"):
        for value in rng.sample([0, -1.0, NAN, INF, "x", [], -INF, {}], 4):
            yield one((*PHASE, key), value)
    for key, value in each(BAD_ENTRIES):
        yield one((*PHASE, key), value)
    for key, value in each(EDGE_ENTRIES):
        yield one((*PHASE, key), value, ANY)
    for key in ("log_every", "keep"):
        yield one((key,), HUGE - 1, ANY)
    for key, value in each(BAD_DATA):
        yield one((*PHASE, "data", key), value)
    yield one((*PHASE, "data", "disjoint"), True, ANY)
    for key, value in each(BAD_DIVERGENCES):
        yield one((*PHASE, "terms"), [{"kind": "kd", "divergence" if key == "kind" else key: value}])
    for value in EDGE_DIVERGENCES:
        settings = {"divergence" if key == "kind" else key: setting for key, setting in value.items()}
        yield one((*PHASE, "terms"), [{**settings, "kind": "kd"}], ANY)
    for value in BAD_HIDDEN:
        yield one((*PHASE, "terms"), [hidden_term(value)])
    yield one((*PHASE, "terms"), [{"kind": "hidden", "sites": ["blocks.0.attn.hook_q"]}], ANY)
    for kind in ("cross_entropy", "kd"):
        yield one((*PHASE, "terms"), [{"kind": kind, "weight": 1e300}], ANY)
    for key, value in each(BAD_GATES):
        yield one((*PHASE, "gate"), {**GATE, key: value})
    for key, value in each(EDGE_GATES):
        yield one((*PHASE, "gate"), {**GATE, key: value}, ANY)
    for key, value in each(BAD_RUNS):
        yield one((key,), value)
    yield from odd_phases(rng)


def odd_phases(rng: random.Random) -> Iterator[Case]:
    """Phases that lack something, or whose entries do not go together."""

    def phase(told: str, expectation: Expect, *phases: dict[str, Any]) -> Case:
        return case("distill", expectation, told, toml_file({**CONFIG, "phases": list(phases)}))

    for target in (0, 15, 16, 31, HUGE, -1):
        expectation = ANY if target in (16, 31) else MUST_REFUSE
        skipped = {**LONG_PHASE, "positions": "skipped", "target_window": target}
        yield phase(f"skipped positions over {target}", expectation, skipped)
    for rope in rng.sample([rope for rope in ODD_ROPES if isinstance(rope, dict)], 8):
        said = {key: value for key, value in rope.items() if value is not None}
        if said != {"rope_type": "default"}:
            turned = {**LONG_PHASE, "theta": None, "rope_parameters": said}
            yield phase(f"phases.0.rope_parameters = {short(said)}", MUST_REFUSE, turned)
    for key in ("name", "data", "window", "steps", "batch_tokens", "lr"):
        yield phase(f"a phase without {key}", MUST_REFUSE, {**LONG_PHASE, key: None})
    yield phase("two phases of one name", MUST_REFUSE, LONG_PHASE, LONG_PHASE)
    yield phase("two phases whose names differ in case", ANY, SHORT_PHASE, {**SHORT_PHASE, "name": "SHORT"})
    for key in ("student", "phases", "out", "teacher"):
        yield case("distill", MUST_REFUSE, f"without {key}", toml_file({**CONFIG, key: None}))


STUDENT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
UNKNOWN_TYPES = (
    "gpt2 mamba t5 bert lama clip whisper vit wav2vec2 encoder-decoder rwkv bloom opt falcon llava blip detr xlnet "
    "gpt_oss llama4 qwen2_vl auto"
)
BAD_STUDENTS = {
    "num_hidden_layers": (0, -1, 10**9, "x", 1.5),
    "hidden_size": (0, -1, 15, 2**40, "x"),
    "intermediate_size": (-1, 2**50, "x"),
    "vocab_size": (0, -1, 43, 2**50, "x"),
    "num_attention_heads": (0, 3, -1, "x", 32),
    "num_key_value_heads": (0, 3, -1, "x"),
    "hidden_act": ("nonsense", 5),
    "initializer_range": (NAN, -1.0, 1e300, "x"),
    "nonsense": (1,),
}
EDGE_STUDENTS = {
    "vocab_size": (80,),
    "max_position_embeddings": (-1, "x"),
    "rms_norm_eps": ("x", NAN, -1.0),
    "rope_parameters": ("x", {"rope_type": "spiral"}, [], {"rope_type": "default", "rope_theta": 0}),
    "attention_dropout": (2.0, "x", -1.0, NAN),
    "pad_token_id": (64, -1, "x"),
    "dtype": ("int8", "x"),
    "tie_word_embeddings": ("x", True),
    "_attn_implementation": ("nonsense",),
    "to_dict": (5,),
    "name_or_path": ("x",),
}


def odd_students(rng: random.Random) -> Iterator[Case]:
    """A student table of another model type, or of sizes that do not fit."""

    def student(told: str, expectation: Expect, table: dict[str, Any]) -> Case:
        return case("distill", expectation, f"student table {told}", toml_file({**CONFIG, "student": table}))

    yield student("as it should be", ANY, STUDENT)
    for kind in (*UNKNOWN_TYPES.split(), "", 5):
        yield student(f"of only model_type {kind!r}", MUST_REFUSE, {"model_type": kind})
    for kind in ("mistral", "qwen2", "gemma", "gpt_neox", "phi3", "cohere", "smollm3", "mixtral", "olmo2"):
        heads = {"num_key_value_heads": None} if kind == "gpt_neox" else {}
        yield student(f"of model_type {kind!r}", ANY, {**STUDENT, "model_type": kind, **heads})
    for key, value in each(BAD_STUDENTS):
        yield student(f"with {key} = {short(value)}", MUST_REFUSE, {**STUDENT, key: value})
    for key, value in each(EDGE_STUDENTS):
        yield student(f"with {key} = {short(value)}", ANY, {**STUDENT, key: value})
    wider = {**CONFIG, "student": {**STUDENT, "hidden_size": 32}}
    compared = at((*PHASE, "terms"), [{"kind": "hidden"}], wider)
    yield case("distill", MUST_REFUSE, "hidden states of different width", toml_file(compared))


def odd_toml(rng: random.Random) -> Iterator[Case]:
    """A file that is no TOML, or TOML of an odd kind."""
    plain = as_toml(CONFIG)
    never: dict[str, str | bytes] = {
        "no UTF-8": plain.encode() + b"# \xff\xfe\n",
        "UTF-16": plain.encode("utf-16"),
        "NUL bytes": plain + "\0",
        "nothing": "",
        "JSON": json.dumps(CONFIG),
        "half of it": plain[: len(plain) // 2],
        "a key twice": plain.replace('"out"', '"out" = "x"\n"out"', 1),
        "100,000 brackets": "x = " + "[" * 100_000,
        "5,000 brackets, closed": "x = " + "[" * 5000 + "]" * 5000,
        "20,000 tables in each other": "x = " + "{a=" * 20_000,
        "a key of 20,000 parts": ".".join("a" * 20_000) + " = 1",
        "a number of 5,000 digits": "seed = " + "9" * 5000 + "\n" + plain,
        "a date as seed": "seed = 2020-01-01\n" + plain,
        "a date as out": plain.replace('"out" = "run"', '"out" = 2020-01-01T00:00:00'),
        "binary": bytes(rng.randrange(256) for _ in range(300)),
        "control characters": plain + "\x07",
    }
    for told, content in never.items():
        yield case("distill", MUST_REFUSE, f"TOML: {told}", put("config.toml", content))
    yield case("distill", SAME_OR_REFUSE, "TOML: a byte-order mark", put("config.toml", "\ufeff" + plain))
    yield case("distill", SAME, "TOML: CRLF", put("config.toml", plain.replace("\n", "\r\n")))
    yield case("distill", SAME, "TOML: comments", put("config.toml", "# é\n" + plain.replace("\n", " # ☃\n")))
    for told, step in (
        ("a folder", folder("config.toml")),
        ("a symlink loop", loop("config.toml")),
        ("gone", remove("config.toml")),
        ("nowhere", link("config.toml", "nowhere")),
    ):
        yield case("distill", MUST_REFUSE, f"config is {told}", step)
    for path in ("", ".", "x" * 300, "model", "\udcff", "/dev/null", "config.toml/x"):
        yield case("distill", MUST_REFUSE, f"config at {path[:30]!a}", positional=[path])
    text = {**LONG_PHASE, "terms": [{"kind": "cross_entropy"}]}
    bytes_student = {
        "model_type": "llama",
        "vocab_size": 259,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    for told, data, expectation in (
        ("a file that is not there", {"files": ["absent.txt"]}, MUST_REFUSE),
        ("a folder", {"files": ["model"]}, MUST_REFUSE),
        ("an empty file", {"files": ["empty.txt"]}, MUST_REFUSE),
        ("no UTF-8", {"files": ["binary.txt"]}, MUST_REFUSE),
        ("a file and a dataset", {"files": ["text.txt"], "dataset": "absent"}, MUST_REFUSE),
        ("a dataset that is not there", {"dataset": "./absent"}, MUST_REFUSE),
        ("a tokenizer that is not there", {"files": ["text.txt"], "tokenizer": "./absent"}, MUST_REFUSE),
        ("a model without a tokenizer", {"files": ["text.txt"], "tokenizer": "model"}, MUST_REFUSE),
        ("shortest 0", {"files": ["text.txt"], "shortest": 0}, MUST_REFUSE),
        ("longest below shortest", {"files": ["text.txt"], "shortest": 5, "longest": 2}, MUST_REFUSE),
        ("nothing long enough", {"files": ["text.txt"], "shortest": 10**6}, MUST_REFUSE),
        ("one short file", {"files": ["text.txt"]}, ANY),
    ):
        table = {
            **CONFIG,
            "student": bytes_student,
            "teacher": None,
            "phases": [{**text, "data": {"kind": "text", **data}}],
        }
        yield case(
            "distill",
            expectation,
            f"text of {told}",
            put("empty.txt", ""),
            put("binary.txt", b"\xff\xfe\0"),
            put("text.txt", "Some words.\n"),
            toml_file(table),
        )


# Runs that are gone on with


def resume(expectation: Expect, told: str, *steps: Step, run: str = "stopped", **more: Any) -> Case:
    steps = (toml_file({**RESUMABLE, "out": run}), *steps)
    return case(
        "distill",
        expectation,
        f"resume: {told}",
        *steps,
        needs=[run],
        extra=["--resume"],
        out=run,
        resumes=run,
        like="resume",
        **more,
    )


FINISHED, LAST, LOG = "stopped/checkpoints/short", "stopped/snapshots/long-000002", "stopped/log.jsonl"
STATE, STOPPED_MANIFEST = f"{LAST}/training.safetensors", "stopped/manifest.json"
HARMLESS_STRAYS = {
    "a .DS_Store in snapshots/": "snapshots/.DS_Store",
    "a .DS_Store in checkpoints/": "checkpoints/.DS_Store",
    "a .DS_Store in a snapshot": "snapshots/long-000002/.DS_Store",
    "a .git folder in snapshots/": "snapshots/.git/HEAD",
    "a .git folder in checkpoints/": "checkpoints/.git/HEAD",
    "a .git folder in the run": ".git/HEAD",
    "notes in the run": "notes.txt",
    "a hidden folder of mine in snapshots/": "snapshots/.mine/thesis.txt",
    "a hidden folder of mine in checkpoints/": "checkpoints/.mine/thesis.txt",
}
STRAYS = {
    "notes in snapshots/": "snapshots/notes.txt",
    "notes in checkpoints/": "checkpoints/notes.txt",
    "a folder of mine in snapshots/": "snapshots/mine/thesis.txt",
    "a folder of mine in checkpoints/": "checkpoints/mine/thesis.txt",
    "a file in a finished checkpoint": "checkpoints/short/README.md",
    "a Thumbs.db in snapshots/": "snapshots/Thumbs.db",
}
ODD_LINES = {
    "a bad line": "{bad",
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "a line without keys": "{}",
    "a line of an unknown phase": '{"phase": "other", "step": 1, "tokens": 1, "loss": 1.0}',
    "a step that is text": '{"phase": "long", "step": "one", "tokens": 1, "loss": 1.0}',
    "a step that is null": '{"phase": "long", "step": null, "tokens": 1, "loss": 1.0}',
    "tokens that are text": '{"phase": "short", "step": 1, "tokens": "x", "loss": 1.0}',
    "a loss that is text": '{"phase": "short", "step": 1, "tokens": 1, "loss": "x"}',
    "a loss that is NaN": '{"phase": "short", "step": 1, "tokens": 1, "loss": NaN}',
    "a loss that is a table": '{"phase": "short", "step": 1, "tokens": 1, "loss": {}}',
    "distances that are words": '{"phase": "short", "step": 1, "tokens": 1, "kd_nats_by_distance": {"x": 1}}',
    "distances that are a list": '{"phase": "short", "step": 1, "tokens": 1, "kd_nats_by_distance": [1]}',
    "a gate that is a number": '{"phase": "short", "step": 1, "tokens": 1, "gate": 5}',
    "a gate of odd columns": '{"phase": "short", "step": 1, "tokens": 1, "gate": [{"x": 1}]}',
    "a missed gate of a number": '{"phase": "short", "step": 1, "tokens": 1, "missed_gate": 5}',
    "a blank line": "",
    "an unknown measure": '{"phase": "short", "step": 1, "tokens": 1, "my_measure": 1.0}',
    "100,000 brackets": "[" * 100_000,
}
ODD_PLACES = {"step": (-1, 0, "1", None, 10**9, 1.5, [], 4), "phase": ("other", None, 5, [], {}, "")}
ODD_ENTRIES = {
    "status": ("nonsense", None, []),
    "wall_s": ("x", None, -5, NAN),
    "run_id": (None, 5),
    "experiment": ("trace", 5),
    "packages": ([], None),
    "git": ("x",),
    "argv": (None,),
}


def resumed_runs(rng: random.Random) -> Iterator[Case]:
    """A run that was cut short, with files that were changed, cut, taken away or added since."""
    yield resume(SAME, "as it is")
    for told, path in HARMLESS_STRAYS.items():
        yield resume(SAME, told, put(f"stopped/{path}", "precious"))
    for told, path in STRAYS.items():
        yield resume(SAME_OR_REFUSE, told, put(f"stopped/{path}", "precious"))
    yield from resumed_logs()
    yield from resumed_snapshots(rng)
    yield from resumed_checkpoints()
    yield from resumed_manifests(rng)
    yield from resumed_complete_runs()


def resumed_logs() -> Iterator[Case]:
    for told, line in ODD_LINES.items():
        yield resume(ANY, f"log ends with {told}", rewrite(LOG, lambda log, line=line: log + line.encode() + b"\n"))
    for told in ("a bad line", "a list", "a line without keys"):
        line = ODD_LINES[told].encode() + b"\n"
        yield resume(ANY, f"log begins with {told}", rewrite(LOG, lambda log, line=line: line + log))
    yield resume(SAME, "log's last line cut short", rewrite(LOG, lambda log: log + b'{"phase": "long", "st'))
    yield resume(ANY, "log is empty", put(LOG, b""))
    yield resume(ANY, "log is gone", remove(LOG))
    yield resume(ANY, "log is a symlink loop", loop(LOG))
    yield resume(MUST_REFUSE, "log is a folder", folder(LOG))
    yield resume(MUST_REFUSE, "log is no UTF-8", rewrite(LOG, lambda log: log + b"\xff\xfe\n"))


def resumed_snapshots(rng: random.Random) -> Iterator[Case]:
    for key, value in each(ODD_PLACES):
        yield resume(
            MUST_REFUSE, f"last snapshot's {key} = {value!r}", set_keys(f"{LAST}/training.json", **{key: value})
        )
    for told, step in broken_files(f"{LAST}/training.json", rng, 7):
        yield resume(MUST_REFUSE, told, step)
    for file in ("training.safetensors", "model.safetensors", "config.json"):
        yield resume(MUST_REFUSE, f"last snapshot without {file}", remove(f"{LAST}/{file}"))
        yield resume(MUST_REFUSE, f"last snapshot's {file} cut", cut(f"{LAST}/{file}", 0.5))
        yield resume(MUST_REFUSE, f"last snapshot's {file} is a folder", folder(f"{LAST}/{file}"))
        yield resume(MUST_REFUSE, f"last snapshot's {file} is a symlink loop", loop(f"{LAST}/{file}"))
    for _ in range(6):
        file = rng.choice(["training.safetensors", "model.safetensors", "training.json"])
        place, bit = rng.random(), rng.randrange(8)
        yield resume(ANY, f"{file} with bit {bit} flipped at {place:.3f}", flip(f"{LAST}/{file}", place, bit))
    for told, change in {
        "of nothing": lambda all: {},
        "without a tensor": without_first,
        "with a tensor renamed": renamed,
        "of another shape": lambda all: {k: x[:1] if x.ndim == 2 else x for k, x in all.items()},
        "of NaN": lambda all: {k: x * NAN if x.is_floating_point() else x for k, x in all.items()},
        "with another random state": lambda all: {k: x[:8] if k.startswith("rng/") else x for k, x in all.items()},
    }.items():
        yield resume(MUST_REFUSE, f"optimizer state {told}", edit_weights(STATE, change))
    yield resume(ANY, "optimizer state with one more tensor", edit_weights(STATE, with_extra("extra")))
    for told, change in {
        "have a NaN": one_value(NAN),
        "have one more tensor": with_extra("e"),
        "are integers": lambda all: {k: x.to(torch.int8) for k, x in all.items()},
    }.items():
        yield resume(MUST_REFUSE, f"snapshot's weights {told}", edit_weights(f"{LAST}/model.safetensors", change))
    yield resume(SAME, "last snapshot removed", remove(LAST))
    yield resume(SAME, "all snapshots removed", remove("stopped/snapshots"))
    yield resume(ANY, "snapshots/ is a file", put("stopped/snapshots", "x"))
    yield resume(ANY, "snapshots/ is a symlink loop", loop("stopped/snapshots"))
    yield resume(ANY, "a snapshot is a file", put("stopped/snapshots/long-000009", "x"))
    yield resume(ANY, "a snapshot is an empty folder", folder("stopped/snapshots/long-000009"))
    yield resume(ANY, "a snapshot is a symlink loop", loop("stopped/snapshots/long-000009"))


def resumed_checkpoints() -> Iterator[Case]:
    none = remove("stopped/snapshots")
    yield resume(ANY, "checkpoints/ is a file", put("stopped/checkpoints", "x"))
    yield resume(ANY, "finished checkpoint gone, snapshots of the next phase there", remove(FINISHED))
    yield resume(ANY, "finished checkpoint is an empty folder", folder(FINISHED), none)
    yield resume(ANY, "finished checkpoint is a file", put(FINISHED, "x"), none)
    yield resume(MUST_REFUSE, "finished checkpoint's weights cut", cut(f"{FINISHED}/model.safetensors", 0.5), none)
    yield resume(MUST_REFUSE, "finished checkpoint's weights gone", remove(f"{FINISHED}/model.safetensors"))
    yield resume(ANY, "a checkpoint of the last phase is an empty folder", folder("stopped/checkpoints/long"))


def resumed_manifests(rng: random.Random) -> Iterator[Case]:
    for key, value in each(ODD_ENTRIES):
        yield resume(ANY, f"manifest {key} = {value!r}", set_keys(STOPPED_MANIFEST, **{key: value}))
    for value in (None, [], {}, "x", 5):
        yield resume(MUST_REFUSE, f"manifest config = {value!r}", set_keys(STOPPED_MANIFEST, config=value))
    other = edit(STOPPED_MANIFEST, lambda manifest: manifest["config"].update(seed=5))
    yield resume(MUST_REFUSE, "manifest of another configuration", other)
    yield resume(ANY, "manifest says complete", set_keys(STOPPED_MANIFEST, status="complete"))
    for key in ("status", "config", "run_id", "wall_s", "packages", "experiment"):
        yield resume(ANY, f"manifest without {key}", drop_key(STOPPED_MANIFEST, key))
    for told, step in broken_files(STOPPED_MANIFEST, rng, 8):
        yield resume(MUST_REFUSE, told, step)
    yield resume(ANY, "mark .rope_probe gone", remove("stopped/.rope_probe"))
    for told, mark in ODD_MARKS.items():
        yield resume(ANY, f"mark .rope_probe is {told}", put("stopped/.rope_probe", mark))
    yield resume(ANY, "metrics of nothing beside it", put("stopped/tables/losses.parquet", b""))
    yield resume(ANY, "metrics are a folder", folder("stopped/tables/losses.parquet"))


def resumed_complete_runs() -> Iterator[Case]:
    for told, expectation, step in (
        ("as it is", SAME, remove("nothing")),
        ("metrics cut", ANY, cut(TABLE_OF["trained"], 0.5)),
        ("metrics gone", ANY, remove(TABLE_OF["trained"])),
        ("log gone", ANY, remove("trained/log.jsonl")),
        ("checkpoint gone", ANY, remove("trained/checkpoints/long")),
        ("manifest packages = []", ANY, set_keys("trained/manifest.json", packages=[])),
        ("manifest missed_gate = 5", ANY, set_keys("trained/manifest.json", missed_gate=5)),
        ("manifest cut", ANY, cut("trained/manifest.json", 0.5)),
    ):
        yield replace(resume(expectation, f"a complete run, {told}", step, run="trained"), like="trained")


# Places to write to


def outs(rng: random.Random) -> Iterator[Case]:
    """--out is a place where nothing can be, must not be, or where something of ours or of the user's lies."""
    for command in ("trace", "spans", "retrieval", "heads"):
        yield from places(command, rng)
        yield from earlier_runs(command, rng)
    yield from places("distill", rng)
    yield from places("report", rng)
    yield from distill_outs()
    yield from report_outs()


def write_to(command: str, out: str, expectation: Expect, told: str, *steps: Step, **more: Any) -> Case:
    """A command that writes to `out`; for distill the configuration says so."""
    if command == "distill":
        steps = (*steps, toml_file({**CONFIG, "out": out}))
    return case(command, expectation, f"out {told}", *steps, out=out, **more)


def in_a_place(told: str, out: str, expectation: Expect, *steps: Step, needs: Sequence[str] = ()) -> tuple[Any, ...]:
    return told, out, expectation, steps, needs


THESIS = put("mine/thesis.txt", "precious")
PLACES = (
    in_a_place("is a file", "file", MUST_REFUSE, put("file", "precious")),
    in_a_place("is under a file", "file/run", MUST_REFUSE, put("file", "precious")),
    in_a_place("is a symlink loop", "loop", MUST_REFUSE, loop("loop")),
    in_a_place("is under a symlink loop", "loop/run", MUST_REFUSE, loop("loop")),
    in_a_place("leads to a folder of mine", "linked", MUST_REFUSE, THESIS, link("linked", "mine")),
    in_a_place("leads to a file", "linked", MUST_REFUSE, put("file", "precious"), link("linked", "file")),
    in_a_place("leads nowhere yet", "linked", ANY, link("linked", "new/place")),
    in_a_place("is a folder of mine", "mine", MUST_REFUSE, THESIS),
    in_a_place("is a folder with a hidden file", "mine", MUST_REFUSE, put("mine/.git/HEAD", "precious")),
    in_a_place("is a folder of an empty folder", "mine", MUST_REFUSE, folder("mine/inner")),
    in_a_place("is an empty folder", "empty", ANY, folder("empty")),
    in_a_place("is new and deep", "a/b/c/d", ANY),
    in_a_place("is empty text", "", MUST_REFUSE),
    in_a_place("is a dot", ".", MUST_REFUSE),
    in_a_place("is two dots", "..", MUST_REFUSE),
    in_a_place("has a name that is too long", "x" * 300, MUST_REFUSE),
    in_a_place("has a name that is just too long with what is added to it", "x" * 250, ANY),
    in_a_place("is a path that is too long", "/".join(["x" * 200] * 30), MUST_REFUSE),
    in_a_place("is under /proc", "/proc/run", MUST_REFUSE),
    in_a_place("is /dev/null", "/dev/null", MUST_REFUSE),
    in_a_place("is under /dev/null", "/dev/null/run", MUST_REFUSE),
    in_a_place("is the model", "model", MUST_REFUSE, needs=["model"]),
    in_a_place("is a file of the model", "model/config.json", MUST_REFUSE, needs=["model"]),
    in_a_place("is a folder that holds a model", "outer", MUST_REFUSE, folder("outer"), copy("model", "outer/model"),
               needs=["model"]),
    in_a_place("is a checkpoint", "checkpoint", MUST_REFUSE, copy("stopped/checkpoints/short", "checkpoint"),
               needs=["stopped"]),
    in_a_place("is a folder of mine with an older mark of ours", "mine", MUST_REFUSE, THESIS,
               put("mine/.rope_probe", "run\n")),
    in_a_place("has a strange name", r"'\"{}%s\u202e\n\té", ANY),
    in_a_place("has a name that begins with a dash", "./-run", ANY),
    in_a_place("has a name of no UTF-8", "run\udcff", ANY),
    in_a_place("has a name of escape characters", "\x1b[31mrun", ANY),
    in_a_place("ends in a slash", "run/", ANY),
    in_a_place("has hidden folders of mine beside it that are called nearly as ours are", "run", ANY,
               put(".run.old-mine/thesis.txt", "precious"), put(".run.partial-mine/thesis.txt", "precious")),
)  # fmt: skip


def places(command: str, rng: random.Random) -> Iterator[Case]:
    """Places that are the same for every command."""
    for told, out, expectation, steps, needs in PLACES:
        if command == "distill" and "\udcff" in out:
            continue  # a file of TOML cannot say it
        yield write_to(command, out, expectation, told, *steps, needs=needs)
        if command in ("trace", "retrieval") and expectation is MUST_REFUSE and rng.random() < 0.5:
            yield write_to(
                command, out, expectation, f"{told}, --overwrite", *steps, needs=needs, extra=["--overwrite"]
            )


OWN_RUN = {"trace": "traced", "spans": "compared", "retrieval": "found", "heads": "looked"}


ODD_MARKS: dict[str, str | bytes] = {
    "an older one": "run\n",
    "of another kind": '{"kind": "checkpoint", "files": []}',
    "no UTF-8": b"\xff\xfe",
    "a list": "[]",
    "null": "null",
    "brackets": "[" * 100_000,
    "without files": '{"kind": "run"}',
    "of odd files": '{"kind": "run", "files": [5, null, {}]}',
    "of a kind that is a list": '{"kind": [], "files": {}}',
    "nothing": "",
}


def earlier_runs(command: str, rng: random.Random) -> Iterator[Case]:
    """--out is an earlier run of this command or another, whole or not, with and without --overwrite."""
    own = OWN_RUN[command]

    def plainly(expectation: Expect, told: str, *steps: Step, out: str = own, **more: Any) -> Case:
        return write_to(command, out, expectation, told, *steps, needs=[own, *more.pop("needs", [])], **more)

    def over(expectation: Expect, told: str, *steps: Step, **more: Any) -> Case:
        return plainly(expectation, f"{told}, --overwrite", *steps, extra=["--overwrite"], **more)

    yield plainly(MUST_REFUSE, "is an earlier run of the same command", says="--overwrite")
    yield over(SAME, "is an earlier run of the same command", replaces=own)
    yield over(ANY, "is a symlink to an earlier run", link("linked", own), out="linked", replaces=own)
    yield over(SAME, "is new", out="run")
    yield over(SAME, "is an empty folder", folder("empty"), out="empty")
    for run in ("traced", "compared", "found", "trained", "stopped", "gallery"):
        if run != own:
            yield plainly(MUST_REFUSE, f"is the run {run!r}", out=run, needs=[run])
            yield over(MUST_REFUSE, f"is the run {run!r}", out=run, needs=[run])
    yield over(MUST_REFUSE, "is an earlier run with a file of mine", put(f"{own}/thesis.txt", "precious"))
    yield over(MUST_REFUSE, "is an earlier run with a hidden file of mine", put(f"{own}/.thesis", "precious"))
    yield over(MUST_REFUSE, "is an earlier run with a folder of mine", put(f"{own}/mine/thesis.txt", "precious"))
    yield over(MUST_REFUSE, "is an earlier run with an empty folder", folder(f"{own}/mine"))
    yield over(MUST_REFUSE, "is an earlier run with a symlink of mine", link(f"{own}/mine", "../model"))
    yield from damaged_runs(own, plainly, over)
    inside = f"{own}/model"
    within = [inside, "after"] if command == "spans" else [inside]
    yield over(MUST_REFUSE, "is an earlier run that holds the model", copy("model", inside), positional=within)
    moved = (move("model", inside), link("model", inside))
    yield over(MUST_REFUSE, "is an earlier run that the model leads to", *moved)
    moved = (folder("outer"), move("model", "outer/model"), link("model", "outer/model"))
    yield over(MUST_REFUSE, "is a folder that the model leads to", *moved, out="outer")
    if command != "retrieval":
        read = {"--tokens": f"{own}/docs.txt", "--window": None, "--document-length": None}
        read = {**STATES_ON, **read} if command == "spans" else read
        for run in (plainly, over):
            yield run(
                MUST_REFUSE, "is an earlier run that holds the tokens", put(f"{own}/docs.txt", "5 6\n"), options=read
            )


def damaged_runs(own: str, plainly: Callable[..., Case], over: Callable[..., Case]) -> Iterator[Case]:
    """An earlier run whose manifest or mark was changed: it is replaced if asked, while the mark says whose it is."""
    manifest, mark = f"{own}/manifest.json", f"{own}/.rope_probe"
    for told, step in {
        "manifest is gone": remove(manifest),
        "manifest is cut": cut(manifest, 0.5),
        "manifest is a list": put(manifest, "[]"),
        "manifest names another experiment": set_keys(manifest, experiment="mine"),
        "manifest has no experiment": drop_key(manifest, "experiment"),
        "manifest is a symlink loop": loop(manifest),
    }.items():
        yield plainly(MUST_REFUSE, f"is an earlier run whose {told}", step)
        yield over(ANY, f"is an earlier run whose {told}", step, replaces=own)
    running = set_keys(manifest, status="running")
    yield plainly(MUST_REFUSE, "is an earlier run that is still running", running)
    yield over(MUST_REFUSE, "is an earlier run that is still running", running)
    for told, content in ODD_MARKS.items():
        yield over(MUST_REFUSE, f"is an earlier run whose mark is {told}", put(mark, content))
    for told, step in (("gone", remove(mark)), ("a folder", folder(mark)), ("a symlink loop", loop(mark))):
        yield plainly(MUST_REFUSE, f"is an earlier run whose mark is {told}", step)
        yield over(MUST_REFUSE, f"is an earlier run whose mark is {told}", step)


def distill_outs() -> Iterator[Case]:
    """Places that distill must leave alone, with and without --resume."""

    def distill(out: str, told: str, *steps: Step, **more: Any) -> Case:
        return case("distill", MUST_REFUSE, f"out {told}", *steps, out=out, **more)

    for extra in ([], ["--resume"]):
        for run in ("traced", "gallery", "found", "trained", "stopped"):
            yield write_to("distill", run, MUST_REFUSE, f"is the run {run!r} {extra}", needs=[run], extra=extra)
        yield write_to("distill", "mine", MUST_REFUSE, f"is a folder of mine {extra}", THESIS, extra=extra)
        yield write_to("distill", "model", MUST_REFUSE, f"is the student {extra}", extra=extra)
    running, complete = toml_file(RESUMABLE), toml_file({**RESUMABLE, "out": "trained"})
    yield distill("stopped", "is the running run, not resumed", running, needs=["stopped"], says="resume")
    yield distill("trained", "is a complete run of the same configuration", complete, needs=["trained"])
    yield distill("run", "is new, --overwrite, which distill has not", extra=["--overwrite"])
    yield distill("file", "by option is a file", put("file", "precious"), extra=["--out", "file"])
    yield distill("run", "by option is empty", extra=["--out", ""])
    odd = distill("run\udcff", "by option is no UTF-8", extra=["--out", "run\udcff"])
    yield replace(odd, expectation=ANY)
    outer = (folder("outer"), copy("model", "outer/model"))
    for role in ("student", "teacher"):
        yield distill("outer", f"holds the {role}", *outer, toml_file({**CONFIG, "out": "outer", role: "outer/model"}))
    moved = (folder("outer"), move("config.toml", "outer/config.toml"))
    given = {"positional": ["outer/config.toml"], "extra": ["--out", "outer"]}
    yield distill("outer", "holds the configuration", *moved, **given)


def report_outs() -> Iterator[Case]:
    """Places that report must leave alone, and an older gallery, which it replaces if it is all the gallery's."""

    def report(out: str, expectation: Expect, told: str, *steps: Step, **more: Any) -> Case:
        return write_to("report", out, expectation, told, *steps, needs=["gallery", "traced", "stopped"], **more)

    yield report("gallery", ANY, "is an older gallery", replaces="gallery")
    for told, path in {
        "a file": "gallery/thesis.txt",
        "a hidden file": "gallery/.git/HEAD",
        "a page": "gallery/mine.html",
        "a folder": "gallery/mine/thesis.txt",
    }.items():
        yield report("gallery", MUST_REFUSE, f"is an older gallery with {told} of mine", put(path, "precious"))
    for told, content in ODD_MARKS.items():
        yield report(
            "gallery", MUST_REFUSE, f"is an older gallery whose mark is {told}", put("gallery/.rope_probe", content)
        )
    for run in ("found", "traced", "stopped"):
        yield report(run, MUST_REFUSE, f"is the run {run!r}")
    moved = (folder("outer"), copy("found", "outer/found"))
    yield report("outer", MUST_REFUSE, "holds the run", *moved, positional=["outer/found"])
    inside = copy("found", "gallery/found")
    yield report("gallery", MUST_REFUSE, "is an older gallery that holds the run", inside, positional=["gallery/found"])
    yield report("found/gallery", ANY, "is inside the run")
    yield report("run", MUST_REFUSE, "is new, --overwrite, which report has not", extra=["--overwrite"])


FAMILIES = (
    odd_options,
    mixed_options,
    command_lines,
    sources,
    odd_texts,
    odd_ggufs,
    kept_trials,
    model_paths,
    odd_configs,
    odd_ropes,
    broken_configs,
    broken_shards,
    odd_indices,
    odd_tensors,
    harmless_weights,
    odd_tokenizers,
    odd_token_files,
    odd_manifests,
    odd_metrics,
    odd_run_folders,
    odd_distill_configs,
    odd_students,
    odd_toml,
    resumed_runs,
    outs,
)


def all_cases() -> list[Case]:
    """Every case of every family, the same each time."""
    made: list[Case] = []
    for family in FAMILIES:
        rng = random.Random(f"{SEED} {family.__name__}")
        made += [replace(one, family=family.__name__) for one in family(rng)]
    return made
