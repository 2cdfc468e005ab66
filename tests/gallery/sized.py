"""Tables as runs of models of any size make them, for every drawing; their numbers are drawn at random."""

from importlib import import_module

import numpy as np
import pandas as pd

from rope_probe import rope
from rope_probe.gallery import figures as plots
from tests.frames import rows_for

for module in ("experiments.longred", "experiments.phase_scaling", "experiments.beyond", "experiments.theta_grid",
               "experiments.rivals", "experiments.pretrained",
               "rope_probe.tracing.heads",
               "rope_probe.distillation.log", "rope_probe.distillation.signal", "rope_probe.spans.drift",
               "rope_probe.tracing.massive", "rope_probe.tracing.positional"):  # fmt: skip
    import_module(module)  # they declare the tables

LONG_NAME = "organisation/A-Model-With-A-Long-Name-135M-Instruct-extended-8k"
TRAINED = [LONG_NAME, LONG_NAME.replace("135M", "1.7B"), "kd", "cross-entropy", "longred", "no training at all"]
DOSES = (0.25, 1.0, 4.0, 16.0, 64.0)
DISTANCES = (8, 16, 32, 64, 128, 256, 512, 900, 1000)


def crossed(**columns):
    """A frame with a row for every combination of the columns' values."""
    return pd.MultiIndex.from_product(columns.values(), names=columns).to_frame(index=False)


def valued(rows, low, high, seed=0):
    """The rows with values drawn between two bounds, evenly in their logarithms, and a float64 control beside them."""
    random = np.random.default_rng(seed)
    value = 10 ** random.uniform(np.log10(low), np.log10(high), len(rows))
    return rows.assign(value=value, value_float64=value * (1 + 1e-6))


def frame_for(drawing, layers, heads, pairs):
    """The frame of one drawing for a model of this size, in the types of its tables."""
    rows = pd.concat(_PARTS[drawing](layers, heads, pairs), ignore_index=True)
    if "model" not in rows:
        rows["model"] = LONG_NAME
    if "seed" not in rows:
        rows["seed"] = 0
    rows["run_id"] = "a"
    return rows_for(drawing, rows)


def _kinds(layers):
    """Every sixth layer sees the whole window, as in Gemma 3."""
    return np.where((np.asarray(layers, dtype=int) + 1) % 6 == 0, "full_attention", "sliding_attention")


def _wavelengths(pairs, theta=10_000.0):
    return rope.wavelengths(rope.inv_freq({"rope_type": "default", "rope_theta": theta}, 2 * pairs)).tolist()


def _shifts(**columns):
    rows = crossed(document=range(2), side=["q", "k", "qk"], **columns)
    return rows.assign(kind="PositionShift", seq_len=1024, arm=LONG_NAME)


def _retrieval(layers, heads, pairs):
    rows = crossed(model=TRAINED, seed=[0, 1, 2], distance=DISTANCES)
    lengths = pd.DataFrame({"model": TRAINED, "metric": "document_length", "phase": "extension", "seq_len": 1000})
    rows = valued(rows, 0.05, 1).assign(metric="accuracy", trials=128, low=0.1, high=0.9, seq_len=1024)
    return [rows, lengths.assign(value=900.0)]


def _windows(layers, heads, pairs):
    longest = {2: 9, 30: 13}.get(layers, 20)  # of a large model, more windows than an axis has room to name
    rows = crossed(seed=[0, 1], seq_len=[2**k for k in range(7, longest)], distance=[2**k for k in range(4, longest)])
    rows = valued(rows[rows["distance"] < rows["seq_len"]], 0.05, 1)
    return [rows.assign(metric="accuracy", task="passkey", trials=8, low=0.1, high=0.9)]


def _asked(layers, heads, pairs):
    arms = ["own", f"theta {LONG_NAME}", "YaRN 2", "YaRN 4"][: 2 if layers == 2 else 4]
    rows = crossed(rotation=arms, temperature=["none", "log_n"], seed=[0, 1], seq_len=[4096, 8192, 16_384],
                   distance=[100, 3000, 6000, 10_000, 14_000], unit=range(4))  # fmt: skip
    rows = rows[rows["distance"] < rows["seq_len"]]
    return [rows.assign(metric="hit", task="passkey", value=(rows["unit"] % 2).astype(float))]


def _meddled(layers, heads, pairs):
    done = ["clean", "global shifted", "global without position", "as many local silenced", f"{LONG_NAME} silenced"]
    rows = crossed(intervention=done, seed=[0, 1, 2])
    of_answers = {"model": LONG_NAME, "seq_len": 1024, "distance": 768}
    answers = valued(rows, 1, 40).assign(metric="answer_logprob_nats", **of_answers)
    hits = valued(rows, 0.1, 1).assign(metric="hit", **of_answers)
    return [answers.assign(value=-answers["value"]), hits]


def _losses_by_position(layers, heads, pairs):
    arms = ["own", f"theta {LONG_NAME}", "YaRN 2", "YaRN 4"][: 2 if layers == 2 else 4]
    rows = crossed(rotation=arms, temperature=["none", "log_n"], seed=[0, 1], position=list(range(0, 16_384, 256)))
    return [valued(rows, 2, 6).assign(metric="loss_nats", task="passkey")]


def _tempered(layers, heads, pairs):
    factors = ["1", "1.5", "2", "3", "4", "log_n"]
    rows = crossed(model=TRAINED, seed=[0, 1, 2], temperature=factors, distance=[64, 128, 256, 512, 1000])
    columns = {"purpose": "judging", "trials": 64, "low": 0.1, "high": 0.9, "seq_len": 1024}
    return [valued(rows, 0.05, 1).assign(metric="accuracy", **columns)]


def _tasks(layers, heads, pairs):
    tasks = ["vt", "cwe", "fwe", "niah_multikey_3", "a_task_of_a_rather_long_name_that_somebody_made"]
    rows = crossed(model=TRAINED, seed=[0, 1], task=tasks)
    return [valued(rows, 0.05, 1).assign(metric="accuracy", trials=64, low=0.1, high=0.9, seq_len=1024)]


def _skills(layers, heads, pairs):
    rows = crossed(model=TRAINED, seed=[0, 1], metric=["short_accuracy", "long_accuracy"])
    rows["seq_len"] = rows["metric"].map({"short_accuracy": 64, "long_accuracy": 1024})
    return [valued(rows, 0.1, 1).assign(query_scale=1.0, trials=256, low=0.1, high=0.9)]


def _grid(layers, heads, pairs):
    thetas = [300.0, 1e4, 2e4, 1e5, 5e5, 1e6]
    base = crossed(head_dim=[16, 2 * pairs], short_theta=thetas, seed=[0, 1])
    cells = crossed(head_dim=[16, 2 * pairs], short_theta=thetas, long_theta=thetas, steps=[75, 250], seed=[0, 1])
    cells = valued(cells, 0.1, 1).assign(metric="accuracy", distance=512, seq_len=1024, phase="extension", trials=64)
    return [cells, base.assign(metric="gate_accuracy", phase="short", seq_len=64, value=0.94)]


def _rotations(layers, heads, pairs):
    parts = []
    for model, theta in (("base", 10_000.0), (LONG_NAME, 500_000.0)):
        for phase, window in (("short", 2048), ("extension", 131_072)):
            lengths = np.array(_wavelengths(pairs, theta))
            at = {"model": model, "phase": phase, "seq_len": window}
            turns = {"metric": "rotations", "pair": range(pairs), "wavelength": lengths, "value": window / lengths}
            parts.append(pd.DataFrame(turns | at))
            parts.append(pd.DataFrame([at | {"metric": "spectrum_use", "value": float((lengths < window).mean())}]))
    return parts


def _losses(layers, heads, pairs):
    rows = crossed(model=TRAINED, seed=[0, 1], phase=["short", "extension", "restoration"],
                   metric=["ce_nats", "kd_nats"], tokens=range(8192, 2_000_001, 200_000))  # fmt: skip
    return [valued(rows, 0.01, 8).assign(seq_len=1024)]


def _copies(layers, heads, pairs):
    inner = [site for site in plots.propagation.PANELS if site != "logits"]
    rows = crossed(layer=range(layers), site=inner, document=range(1, 16))
    rows["site"] = "blocks." + rows["layer"].astype(str) + "." + rows["site"]
    rows = pd.concat([rows.assign(attention=_kinds(rows["layer"])), crossed(site=["logits"], document=range(1, 16))])
    return [valued(rows, 1e-3, 2).assign(kind="Copy", metric="rel_l2", seq_len=1024, arm=LONG_NAME)]


def _doses(layers, heads, pairs):
    rows = valued(_shifts(delta_tokens=DOSES), 1e-4, 5).assign(metric="kl_nats", site="logits")
    both = rows["side"] == "qk"
    return [rows.assign(value=rows["value"].mask(both, 1e-14), value_float64=rows["value_float64"].mask(both, 1e-28))]


def _injected(layers, heads, pairs):
    last = {"site": f"blocks.{layers - 1}.hook_resid_post", "metric": "rel_l2"}
    inner = _shifts(inject_layer=range(layers), layer=range(layers)).assign(**last)
    output = _shifts(inject_layer=range(layers)).assign(site="logits", metric="rel_l2")
    rows = pd.concat([inner, output]).assign(delta_tokens=16.0)
    return [valued(rows.assign(attention=_kinds(rows["inject_layer"])), 1e-5, 1)]


def _lenses(layers, heads, pairs):
    one = _shifts(inject_layer=range(layers), layer=range(layers))
    everywhere = _shifts(layer=range(layers)).assign(attention=_kinds(_shifts(layer=range(layers))["layer"]))
    rows = pd.concat([everywhere, one.assign(attention=_kinds(one["inject_layer"]), restriction="one layer")])
    rows["site"] = "blocks." + rows["layer"].astype(str) + ".lens"
    return [valued(rows.assign(delta_tokens=16.0, metric="kl_nats"), 1e-5, 1)]


def _of_pairs(layers, heads, pairs):
    lengths = dict(enumerate(_wavelengths(pairs)))
    rows = _shifts(pair=range(pairs)).assign(delta_tokens=16.0, metric="kl_nats", site="logits")
    return [valued(rows.assign(wavelength=rows["pair"].map(lengths)), 1e-5, 1)]


def _of_layers(layers, heads, pairs):
    rows = _shifts(inject_layer=range(layers)).assign(delta_tokens=16.0, metric="kl_nats", site="logits")
    return [valued(rows.assign(attention=_kinds(rows["inject_layer"])), 1e-5, 1)]


def _of_heads(layers, heads, pairs):
    rows = crossed(side=["q", "k"], inject_layer=range(layers), head=range(heads), document=range(2))
    rows = rows.assign(kind="PositionShift", seq_len=1024, delta_tokens=16.0, metric="kl_nats", site="logits")
    return [valued(rows.assign(attention=_kinds(rows["inject_layer"])), 1e-7, 1)]


def _pairs_of_layers(layers, heads, pairs):
    rows = crossed(side=["q", "k"], inject_layer=range(layers), pair=range(pairs), document=range(2))
    rows = rows.assign(kind="PairTurn", seq_len=1024, radians=1.0, metric="kl_nats", site="logits")
    rows = rows.assign(wavelength=rows["pair"].map(dict(enumerate(_wavelengths(pairs)))))
    return [valued(rows.assign(attention=_kinds(rows["inject_layer"])), 1e-7, 1)]


def _scores(layers, heads, pairs):
    rows = crossed(metric=list(plots.heads.PANELS), layer=range(layers), head=range(heads))
    rows = rows.assign(queries=900, trials=np.where(rows["metric"] == "retrieval_head", 48, None))
    return [valued(rows.assign(attention=_kinds(rows["layer"])), 0.01, 1)]


def _contributions(layers, heads, pairs):
    lengths = dict(enumerate(_wavelengths(pairs)))
    rows = crossed(layer=range(layers), head=range(heads), pair=range(pairs)).assign(metric="pair_contribution")
    rows = valued(rows.assign(wavelength=rows["pair"].map(lengths)), 1e-3, 2)
    return [rows.assign(value=rows["value"] - 0.5)]


def _massive(layers, heads, pairs):
    lengths = dict(enumerate(_wavelengths(pairs)))
    rows = crossed(states=list(plots.massive.PANELS), layer=range(layers), head=range(heads), pair=range(pairs))
    rows = rows.assign(metric="ratio", seq_len=1024, dimension=rows["pair"], partner=rows["pair"] + pairs)
    return [valued(rows.assign(wavelength=rows["pair"].map(lengths)), 0.1, 30)]


def _shares(layers, heads, pairs):
    sites = ["hook_resid_post", "hook_attn_out", "attn.unrotated_q", "attn.unrotated_k"]
    metrics = ["content_share", "position_share", "interaction_share", plots.positional.BY_CHANCE]
    inner = crossed(seed=[0, 1], layer=range(layers), site=sites, metric=metrics)
    inner["site"] = "blocks." + inner["layer"].astype(str) + "." + inner["site"]
    rows = valued(pd.concat([inner, crossed(seed=[0, 1], site=["logits"], metric=metrics)]), 1e-5, 1)
    return [rows.assign(seq_len=1024, contents=16, content_length=64, places=15)]


def _drift(layers, heads, pairs):
    states = crossed(model=TRAINED, seed=[0, 1], layer=range(layers)).assign(metric="cosine_distance")
    attention = crossed(model=TRAINED, layer=range(layers), head=range(heads)).assign(metric="attention_kl_nats")
    return [valued(pd.concat([states, attention]), 1e-3, 1).assign(seq_len=1024, positions=1024)]


def _weights(layers, heads, pairs):
    lengths, after = dict(enumerate(_wavelengths(pairs))), dict(enumerate(_wavelengths(pairs, 500_000.0)))
    parts = []
    for site, count in (("W_Q", heads), ("W_K", max(1, heads // 4))):
        rows = crossed(layer=range(layers), head=range(count), pair=range(pairs), metric=["rel_change", "change_norm"])
        sites = ("blocks." + rows["layer"].astype(str) + ".attn.").astype("string") + site
        parts.append(rows.assign(site=sites))
    rows = pd.concat(parts, ignore_index=True)
    rows = rows.assign(wavelength=rows["pair"].map(lengths), wavelength_after=rows["pair"].map(after))
    ends = pd.DataFrame({"metric": "turning_pairs", "phase": ["before", "after"], "seq_len": [2048, 131_072]})
    return [valued(rows, 1e-3, 0.5), ends.assign(value=[0.6 * pairs, 0.65 * pairs])]


def _parts_of_weights(layers, heads, pairs):
    sites = ["attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp"]
    rows = crossed(seed=[0, 1], layer=range(layers), site=sites, metric=["rel_change", "change_norm"])
    rows["site"] = "blocks." + rows["layer"].astype(str) + "." + rows["site"]
    return [valued(rows, 1e-3, 0.5)]


def _curves(layers, heads, pairs):
    at = {"seed": [0, 1], "distance": [8, 512], "span_set": [f"spans that {LONG_NAME} kept", "spans put back"]}
    named = crossed(**at, order=["by single effect", "greedy", "by gradient", LONG_NAME], moved=range(0, 33, 4))
    random = crossed(**at, order=["random"], draw=range(4), moved=range(0, 33, 4))
    rows = valued(pd.concat([named, random]), 0.05, 1)
    return [rows.assign(movable=32, metric="accuracy", seq_len=1024, trials=16)]


def _groups(layers, heads, pairs):
    groups = ["nothing", "W_Q", "W_K", "W_Q and W_K", LONG_NAME, "everything but the embedding and the norms"]
    rows = crossed(seed=[0, 1], into=["start", "end"], group=groups, seq_len=[64, 1024], distance=[8, 32])
    return [valued(rows, 0.05, 1).assign(metric="accuracy", trials=32)]


def _signal(layers, heads, pairs):
    students = TRAINED[:3]
    shift = "PositionShift(side='q', delta_tokens=16.0)"
    spaces = crossed(model=students, seed=[0, 1], distance=[0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    spaces["occurrence"] = np.where(spaces["distance"] == 0, "new", "again")
    sites = [f"blocks.{layer}.attn.W_{matrix}" for layer in range(layers) for matrix in "QKV"]
    matrices = crossed(model=students, seed=[0, 1], site=sites)
    parts = [spaces.assign(metric=name) for name in ("loss_kl_nats", "signal_kl_nats", "remaining_kl_nats")]
    parts += [spaces[:1].assign(metric="signal_kl_nats", occurrence=None, distance=None)]
    names = ("loss_gradient", "signal_gradient", "remaining_gradient_cosine")
    parts += [matrices.assign(metric=name) for name in names]
    return [valued(part, 0.01, 1, seed).assign(perturbation=shift, seq_len=1024) for seed, part in enumerate(parts)]


def _cost(layers, heads, pairs):
    rows = crossed(layers=[layers, 2 * layers], perturbations=[8, 81], seq_len=[256, 512, 1024, 2048, 4096],
                   metric=["seconds", "seconds_fitted"])  # fmt: skip
    return [valued(rows, 0.5, 200)]


_PARTS = {
    "retrieval_by_distance": _retrieval,
    "retrieval_by_task": _tasks,
    "retrieval_map": _windows,
    "retrieval_by_temperature": _tempered,
    "loss_by_position": _losses_by_position,
    "window_by_distance": _asked,
    "passkey_by_intervention": _meddled,
    "trade_off": _skills,
    "theta_grid": _grid,
    "rotations_by_pair": _rotations,
    "loss_curves": _losses,
    "copy_heatmap": _copies,
    "dose_response": _doses,
    "layer_effects": _of_layers,
    "head_effects": _of_heads,
    "pair_effects": _pairs_of_layers,
    "head_map": _scores,
    "head_pairs": _contributions,
    "massive_map": _massive,
    "positional_shares": _shares,
    "lens_by_layer": _lenses,
    "drift_by_layer": _drift,
    "injected_by_read": _injected,
    "sensitivity_by_pair": _of_pairs,
    "transplants": _groups,
    "causal_curves": _curves,
    "change_by_part": _parts_of_weights,
    "span_heatmap": _weights,
    "span_heads": _weights,
    "signal_of_distillation": _signal,
    "trace_cost": _cost,
}
