"""Perturbations from TOML are the Python objects, and a slip in one is told in one line."""

from dataclasses import dataclass

import pytest

from rope_probe import (
    AttentionTemperature,
    DocumentOffset,
    InputError,
    PairFreeze,
    PairTurn,
    PositionJitter,
    PositionShift,
    ThetaSwap,
)
from rope_probe.tracing.perturbation_files import ARM, SHORT_NAMES, read_perturbations
from rope_probe.tracing.perturbations import Perturbation, Selection, Side

SAME = {
    'kind = "shift"\nside = "q"\ntokens = 16': PositionShift("q", 16.0),
    'kind = "PositionShift"\nside = "k"\ntokens = -0.5\nlayers = [1, 3]': PositionShift("k", -0.5, layers=(1, 3)),
    'kind = "shift"\nside = "qk"\ntokens = 1e3\npositions = "2-5"\nheads = 1': PositionShift(
        "qk", 1000.0, positions=(2, 3, 4, 5), heads=1
    ),
    'kind = "jitter"\nside = "q"\ntokens = 4\nseed = 7\npairs = "all"': PositionJitter("q", 4.0, 7),
    'kind = "theta"\nside = "qk"\ntheta = 40_000': ThetaSwap("qk", 40000.0),
    'kind = "turn"\nside = "k"\nradians = 1\npairs = 0': PairTurn("k", 1.0, pairs=0),
    'kind = "freeze"\nside = "qk"\npairs = "0-1"': PairFreeze("qk", (0, 1)),
    'kind = "freeze"\nside = "q"\npairs = "all"\nat = 3': PairFreeze("q", None, 3.0),
    'kind = "offset"\ndocuments = [0, 2]\ntokens = 64': DocumentOffset((0, 2), 64.0),
    'kind = "temperature"\nfactor = 2': AttentionTemperature(2.0),
    'kind = "temperature"\nfactor = "log_n"\nreference = 512': AttentionTemperature("log_n", reference=512),
}


def written(tmp_path, *entries):
    file = tmp_path / "mine.toml"
    file.write_text("\n".join(f"[[perturbations]]\n{entry}\n" for entry in entries))
    return file


@pytest.mark.parametrize("entry", SAME)
def test_an_entry_is_the_python_object(tmp_path, entry):
    assert read_perturbations(written(tmp_path, entry)) == {ARM: [SAME[entry]]}


def test_every_kind_has_an_entry_above():
    assert {type(one) for one in SAME.values()} == set(SHORT_NAMES.values())


def test_entries_are_grouped_by_arm_in_their_order(tmp_path):
    named = ['arm = "a"\nkind = "shift"\nside = "q"\ntokens = 1', 'kind = "shift"\nside = "q"\ntokens = 2']
    named.append('arm = "a"\nkind = "shift"\nside = "q"\ntokens = 3')
    arms = read_perturbations(written(tmp_path, *named))
    assert {arm: [one.tokens for one in listed] for arm, listed in arms.items()} == {"a": [1, 3], ARM: [2]}


@dataclass(frozen=True)
class OfMyOwn(Perturbation):
    """A kind that the package does not have."""

    side: Side
    strength: float
    layers: Selection = None
    heads: Selection = None
    pairs: Selection = None
    positions: Selection = None

    def angles(self, rotary, positions, window):
        raise NotImplementedError


def test_kinds_of_ones_own_are_known_by_their_class():
    entry = {"kind": "OfMyOwn", "side": "q", "strength": 2, "layers": [1]}
    assert read_perturbations({"perturbations": [entry]}) == {ARM: [OfMyOwn("q", 2.0, layers=(1,))]}


SHIFT = 'kind = "shift"\nside = "q"\ntokens = 1\n'
BAD = {
    "unknown key": (SHIFT + "layer = 1", "perturbations.0.layer: there is no such key; shift has side, tokens, layers"),
    "unknown kind": ('kind = "shove"', "kind 'shove' is unknown; kinds are shift, jitter, theta"),
    "no kind": ("tokens = 1", "it has no kind, which says what it is; kinds are shift"),
    "missing key": ('kind = "shift"\nside = "q"', "perturbations.0.tokens: it is missing, and shift needs it"),
    "text for a number": ('kind = "shift"\nside = "q"\ntokens = "16"', "tokens: it must be a number, but it is '16'"),
    "a boolean for a number": ('kind = "shift"\nside = "q"\ntokens = true', "it must be a number, but it is True"),
    "another side": ('kind = "shift"\nside = "v"\ntokens = 1', "side: it must be 'q', 'k' or 'qk', but it is 'v'"),
    "a broken layer": (SHIFT + "layers = 1.5", "layers: it must be a whole number, a list of them, a range like"),
    "a list of words": (SHIFT + 'heads = ["one"]', "heads: it must be a whole number, a list of them"),
    "a range backwards": (SHIFT + 'pairs = "9-4"', "pairs: it must be a whole number"),
    "a range past all bounds": (SHIFT + 'positions = "0-999999999"', "positions: it must be"),
    "all where all cannot be": ('kind = "offset"\ndocuments = "all"\ntokens = 1', "documents: it must be"),
    "a factor in words": ('kind = "temperature"\nfactor = "hot"', "factor: it must be a number or 'log_n'"),
    "not finite": ('kind = "shift"\nside = "q"\ntokens = nan', "PositionShift.tokens must be a finite number"),
    "log_n without a reference": ('kind = "temperature"\nfactor = "log_n"', "goes with factor 'log_n' alone"),
    "an arm that is no text": (SHIFT + "arm = 3", "perturbations.0.arm: it must be text, but it is 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_slip_is_one_line_that_names_the_file_and_the_key(tmp_path, case):
    entry, named = BAD[case]
    file = written(tmp_path, entry)
    with pytest.raises(InputError) as refused:
        read_perturbations(file)
    assert str(refused.value).startswith(f"{file}: perturbations.0")
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "named"), [
    ("", "must be a list of tables"), ("perturbations = 3", "must be a list of tables"),
    ("perturbations = [3]", "perturbations.0: it must be a table, but it is 3"),
    ("[[perturbation]]\nkind = 'shift'", "perturbation: there is no such key; perturbations stand under"),
    ("[[perturbations]\n", "is not TOML"),
])  # fmt: skip
def test_a_file_of_another_shape_is_told(tmp_path, text, named):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match=r"mine\.toml") as refused:
        read_perturbations(tmp_path / "mine.toml")
    assert named in str(refused.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match="cannot read the perturbations"):
        read_perturbations(tmp_path / "absent.toml")
