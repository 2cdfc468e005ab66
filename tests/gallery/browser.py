"""Figures in headless Chromium: where each of their parts lies, in pixels."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import plotly

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
_PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:0;background:%(background)s">
<script src="%(plotly)s"></script>
<script>const figures = %(figures)s, widths = %(widths)s, keep = %(keep)s;</script>
<script>
function box(element) {
  const r = element.getBoundingClientRect();
  return [r.left, r.top, r.right, r.bottom];
}
function partsOf(div) {
  const layout = div._fullLayout, origin = box(div), parts = [];
  const add = (kind, element, text) => {
    const b = box(element);
    if (b[2] - b[0] < 0.1 || b[3] - b[1] < 0.1) return;
    parts.push({kind, text: (text || element.textContent || "").slice(0, 60),
      box: [b[0] - origin[0], b[1] - origin[1], b[2] - origin[0], b[3] - origin[1]]});
  };
  div.querySelectorAll(".gtitle").forEach(e => add("title", e));
  div.querySelectorAll(".annotation").forEach(e => {
    const note = layout.annotations[Number(e.getAttribute("data-index"))];
    add(note.name || "note", e.querySelector(".annotation-text-g") || e);
  });
  div.querySelectorAll("g.legend").forEach(e => add("legend", e, "legend"));
  div.querySelectorAll("g.legend .scrollbar").forEach(e => add("scrollbar", e, "scrollbar"));
  div.querySelectorAll(".cartesianlayer [class$=tick] text").forEach(e => add("tick", e));
  div.querySelectorAll(".infolayer [class*=title]").forEach(e => {
    const kind = /^g-([xy]\\d*)title$/.exec(e.getAttribute("class"));
    if (kind) add("axis title", e);
  });
  div.querySelectorAll(".infolayer > .colorbar, .infolayer > g[class^=cb]").forEach(e => {
    if (/^cb/.test(e.getAttribute("class")) && e.tagName === "g") add("colour bar", e, "colour bar");
  });
  div.querySelectorAll(".cbaxis text").forEach(e => add("bar tick", e));
  for (const id of Object.keys(layout._plots)) {
    const {xaxis: x, yaxis: y} = layout._plots[id];
    parts.push({kind: "plot", text: id, box: [x._offset, y._offset, x._offset + x._length, y._offset + y._length]});
  }
  return {width: layout.width, height: layout.height, parts};
}
async function measure() {
  const found = {};
  for (const [name, figure] of Object.entries(figures)) {
    for (const width of widths) {
      const div = document.createElement("div");
      div.style.width = width + "px";
      document.body.appendChild(div);
      await Plotly.newPlot(div, figure.data, figure.layout, {responsive: true, displayModeBar: false});
      found[name + "@" + width] = partsOf(div);
      if (!keep) { Plotly.purge(div); div.remove(); }
    }
  }
  return found;
}
const done = measure().catch(error => ({error: String(error.stack || error)}));
done.then(found => {
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  result.hidden = true;
  document.body.appendChild(result);
});
</script></body>"""


def write_page(figures, widths, path, *, keep=False, background="white"):
    """A page that draws figures (JSON by name) at these widths, one after the other, and tells where the parts lie."""
    drawn = json.dumps(figures).replace("<", "\\u003c")
    values = {"plotly": _PLOTLY.as_uri(), "figures": drawn, "widths": json.dumps(list(widths)),
              "keep": json.dumps(keep), "background": background}  # fmt: skip
    page = _PAGE
    for key, value in values.items():
        page = page.replace(f"%({key})s", value)
    path.write_text(page, encoding="utf-8")
    return path


def options(folder):
    """What Chromium is started with; its own files lie in a folder of this test."""
    return [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/browser"]


def parts_of(figures, widths, folder):
    """By "name@width", the width and height of each figure and the boxes of its parts, as Chromium lays them out."""
    page = write_page(figures, widths, folder / "measured.html")
    command = [*options(folder), "--window-size=1200,900", "--virtual-time-budget=100000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    found = re.search(r'<pre id="result"[^>]*>(.*?)</pre>', shown, flags=re.DOTALL)
    assert found, "the page did not finish"
    parts = json.loads(html.unescape(found.group(1)))
    assert "error" not in parts, parts["error"]
    return parts


_INSIDE = {"plot", "note", "mark", "tick"}
"""What may lie over a plot: its own lines and labels."""
_TOUCHING = 1.5
"""Pixels by which the boxes of two lines of text may overlap without their letters doing so."""


def collisions(found):
    """What overlaps in one figure, and what lies outside it, as text."""
    parts = [part for part in found["parts"] if part["kind"] != "bar tick"]
    faults = []
    for i, one in enumerate(parts):
        left, top, right, bottom = one["box"]
        if left < -1 or top < -1 or right > found["width"] + 1 or bottom > found["height"] + 1:
            faults.append(f"{one['kind']} {one['text']!r} is outside: {[round(x) for x in one['box']]}")
        for other in parts[i + 1 :]:
            kinds = {one["kind"], other["kind"]}
            if ("plot" in kinds and kinds <= _INSIDE) or kinds == {"legend", "scrollbar"}:
                continue
            across = min(right, other["box"][2]) - max(left, other["box"][0])
            down = min(bottom, other["box"][3]) - max(top, other["box"][1])
            if across > _TOUCHING and down > _TOUCHING:
                faults.append(f"{one['kind']} {one['text']!r} lies over {other['kind']} {other['text']!r}")
    bar_ticks = [part for part in found["parts"] if part["kind"] == "bar tick"]
    for i, one in enumerate(bar_ticks):
        for other in bar_ticks[i + 1 :]:
            across = min(one["box"][2], other["box"][2]) - max(one["box"][0], other["box"][0])
            down = min(one["box"][3], other["box"][3]) - max(one["box"][1], other["box"][1])
            if across > _TOUCHING and down > _TOUCHING:
                faults.append(f"bar ticks {one['text']!r} and {other['text']!r}")
    return faults
