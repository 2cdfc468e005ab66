"""A gallery of hostile names, made of what tiny models were measured for; and reading its pages without a browser."""

from html.parser import HTMLParser
from pathlib import Path

from rope_probe import PositionShift, copy_deltas, load_model, repeated_window, trace
from rope_probe.distillation.log import LOSSES
from rope_probe.gallery.report import gallery
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.results import new_run
from rope_probe.runs.verdicts import Section, beside, verdict, verdicts
from rope_probe.tracing.propagation import DELTAS
from tests import zoo

CLOSING = "</script><script>window.hacked = 1</script>"
IMAGE = '"><img src=x onerror="window.hacked = 1">'
TEMPLATE = "{{ 7 * 7 }} ${window.hacked = 1} %{x} \u2028 &lt;b&gt;"
HOSTILE = {
    "experiment": f"propagation {CLOSING}",
    "model": f"model {CLOSING}",
    "other model": f"model {IMAGE}",
    "arm": f"arm {IMAGE}",
    "phase": f"phase {TEMPLATE}",
    "config": f"config {CLOSING}",
    "question": f"question {CLOSING} {IMAGE}",
    "prediction": f"prediction {IMAGE} {CLOSING}",
    "claim": f"claim {CLOSING} {IMAGE} {TEMPLATE}",
    "told beside": f"beside {IMAGE}",
}


def hostile_runs(folder):
    """Run directories whose every name is hostile, and the report on them."""
    model = load_model(zoo.llama())
    window = repeated_window(zoo.tokens(1, 10)[0], 4)
    shifts = [PositionShift(side, dose) for side in ("q", "k", "qk") for dose in (0.25, 1.0, 4.0)]
    narrow = [
        PositionShift("q", 4.0, **where)
        for where in (*({"layers": i} for i in (0, 1)), *({"layers": 1, "heads": h} for h in (0, 1)),
                      *({"pairs": p} for p in range(4)))
    ]  # fmt: skip
    copies = copy_deltas(model, window)
    traced = trace(model, window, shifts, control=True)
    parts = trace(model, window, narrow, control=True)
    config = {"note": HOSTILE["config"], HOSTILE["config"]: [HOSTILE["config"]]}
    with new_run(folder / "propagation", HOSTILE["experiment"], config) as run:
        for name in ("model", "other model"):
            run.record(DELTAS, copies, model=HOSTILE[name], seed=0, arm=HOSTILE["arm"])
            run.record(DELTAS, traced, model=HOSTILE[name], seed=0, arm=HOSTILE["arm"])
            run.record(DELTAS, parts, model=HOSTILE[name], seed=0)
        run.manifest["argv"] = ["/anywhere/experiments/propagation.py", HOSTILE["config"], HOSTILE["model"]]
    rows = [
        {"distance": d, "seq_len": 64, "phase": HOSTILE["phase"], "metric": "accuracy", "value": v, "trials": 8}
        for d, v in ((8, 0.75), (16, 0.5), (32, 0.25))
    ]
    with new_run(folder / "training", "training", config) as run:
        for name in ("model", "other model"):
            run.record(RETRIEVAL, rows, model=HOSTILE[name], seed=0)
            losses = [{"tokens": 8 * i, "metric": "ce_nats", "value": 3.0 / i, "phase": "short"} for i in (1, 2, 3)]
            run.record(LOSSES, losses, model=HOSTILE[name], seed=0)
    made = [
        verdict(1, HOSTILE["claim"], 0.5, True, n=2, low=0.4, high=0.6),
        verdict(1, "another claim", 0.25, False, n=1, low=0.2, high=0.3),
        verdict(1, "a claim without an interval", 0.25, True),
        verdict(2, "an undecided claim", 0.125, None, n=2, low=-1.0, high=1.0),
        verdict(2, "an identity", 1e-12, True, kind="identity"),
        beside(HOSTILE["told beside"], 2.0),
    ]
    report = Section(
        verdicts(made),
        question=HOSTILE["question"],
        predictions={1: HOSTILE["prediction"], 2: "Another prediction.", 3: "One that is not judged yet."},
        figures={1: ("layer_effects", "copy_heatmap"), 2: ("layer_effects", "no_such_drawing")},
    )
    return [folder / "propagation", folder / "training"], {HOSTILE["experiment"]: report}


def hostile_gallery(folder):
    """The gallery of these; its index."""
    runs, reports = hostile_runs(folder)
    return gallery(runs, folder / "gallery", reports)


VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A page as it is parsed: its links, scripts, ids, embedded JSON, text; and tags that do not match."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.ids, self.data, self.text, self.odd, self.open = Path(path), [], [], {}, "", [], []
        self.referred = []
        self.tags = []
        self.feed(self.path.read_text(encoding="utf-8"))
        self.odd += [f"<{tag}> is not closed" for tag, _ in self.open]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("aria-controls", "aria-labelledby", "aria-describedby", "data-figure"):
            self.referred += (attributes.get(name) or "").split()
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.odd.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.data[attributes.get("id", "")] = self.data.get(attributes.get("id", ""), "") + data
        elif tag not in ("style", "title"):
            self.text += data

    @property
    def pictures(self):
        """The anchors of its figures."""
        return [name.removesuffix("-data") for name in self.data if name.endswith("-data")]


def pages_of(folder):
    return {path.name: Page(path) for path in sorted(Path(folder).glob("*.html"))}
