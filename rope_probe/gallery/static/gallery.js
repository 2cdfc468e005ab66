// Draws figures as they come near, follows the theme, and makes tabs, tables and reloading work. Fetches nothing.
(function () {
  "use strict";
  var root = document.documentElement;
  var system = window.matchMedia("(prefers-color-scheme: dark)");
  var CONFIG = { responsive: true, displayModeBar: false, displaylogo: false };
  var THEMES = ["system", "light", "dark"];
  var NAMES = { system: "as the system", light: "light", dark: "dark" };

  function remembered(storage, key) {
    try { return window[storage].getItem(key); } catch (refused) { return null; }
  }
  function remember(storage, key, value) {
    try { window[storage].setItem(key, value); } catch (refused) { /* it holds for this page alone */ }
  }

  // Theme

  function chosenTheme() { return root.dataset.theme || "system"; }
  function shownTheme() {
    var chosen = chosenTheme();
    return chosen === "system" ? (system.matches ? "dark" : "light") : chosen;
  }
  function nameTheme(button) { button.textContent = "Theme: " + NAMES[chosenTheme()]; }
  function setUpTheme() {
    var button = document.getElementById("theme");
    nameTheme(button);
    button.addEventListener("click", function () {
      var next = THEMES[(THEMES.indexOf(chosenTheme()) + 1) % THEMES.length];
      if (next === "system") delete root.dataset.theme; else root.dataset.theme = next;
      remember("localStorage", "rope_probe-theme", next);
      nameTheme(button);
      redraw();
    });
    system.addEventListener("change", redraw);
  }

  // Figures

  function template() { return window.galleryTemplates[shownTheme()]; }

  // A figure has two layouts: one for telephones, one for what is wider.
  function widthOf(plot) { return plot.clientWidth < 600 ? "narrow" : "wide"; }

  function draw(plot) {
    var spec = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    var width = widthOf(plot);
    var layout = spec[width].layout;
    layout.template = template();
    spec.data.forEach(function (trace, i) { if (spec[width].names[i] !== null) trace.name = spec[width].names[i]; });
    plot.style.height = layout.height + "px";
    return window.Plotly.react(plot, spec.data, layout, CONFIG).then(function () {
      plot.dataset.drawn = shownTheme() + "-" + width;
      var box = plot.querySelector(".plot-container");
      if (box) box.setAttribute("aria-hidden", "true");
    });
  }

  function redraw() {
    plots().forEach(function (plot) {
      if (plot.dataset.drawn && plot.dataset.drawn !== shownTheme() + "-" + widthOf(plot)) draw(plot);
    });
  }

  function plots() { return Array.prototype.slice.call(document.querySelectorAll(".plot[data-figure]")); }

  function setUpFigures() {
    var all = plots();
    if (!all.length) return;
    if (!window.Plotly) { all.forEach(function (plot) { plot.textContent = "The plotly script did not load."; }); return; }
    var waiting = new IntersectionObserver(function (entries) {
      entries.forEach(function (entry) {
        if (!entry.isIntersecting) return;
        waiting.unobserve(entry.target);
        draw(entry.target);
      });
    }, { rootMargin: "600px 0px" });
    all.forEach(function (plot) { waiting.observe(plot); });
    var resized;
    window.addEventListener("resize", function () { clearTimeout(resized); resized = setTimeout(redraw, 200); });
    window.addEventListener("beforeprint", function () {
      all.forEach(function (plot) { if (!plot.dataset.drawn && plot.offsetParent) draw(plot); });
    });
    document.querySelectorAll("button[data-save]").forEach(function (button) {
      button.addEventListener("click", function () { save(button); });
    });
  }

  function save(button) {
    var plot = button.closest("figure").querySelector(".plot");
    var drawn = plot.dataset.drawn ? Promise.resolve() : draw(plot);
    drawn.then(function () {
      window.Plotly.downloadImage(plot, {
        format: button.dataset.save, filename: plot.closest("figure").id, scale: button.dataset.save === "png" ? 2 : 1
      });
    });
  }

  // Tabs: arrow keys move between them, Home and End to the ends

  function setUpTabs() {
    document.querySelectorAll("[role=tablist]").forEach(function (list) {
      var tabs = Array.prototype.slice.call(list.querySelectorAll("[role=tab]"));
      function choose(tab, focus) {
        tabs.forEach(function (other) {
          var is = other === tab;
          other.setAttribute("aria-selected", String(is));
          other.tabIndex = is ? 0 : -1;
          document.getElementById(other.getAttribute("aria-controls")).hidden = !is;
        });
        if (focus) tab.focus();
      }
      tabs.forEach(function (tab, i) {
        tab.addEventListener("click", function () { choose(tab, false); });
        tab.addEventListener("keydown", function (event) {
          var to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
          if (to === undefined) return;
          event.preventDefault();
          choose(tabs[(to + tabs.length) % tabs.length], true);
        });
      });
      choose(tabs[0], false);
    });
  }

  // Tables that sort by a column

  function setUpSorting() {
    document.querySelectorAll("table.numbers").forEach(function (table) {
      var heads = Array.prototype.slice.call(table.querySelectorAll("thead th"));
      heads.forEach(function (head, column) {
        head.querySelector("button").addEventListener("click", function () {
          var falling = head.getAttribute("aria-sort") !== "descending";
          heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
          head.setAttribute("aria-sort", falling ? "descending" : "ascending");
          var body = table.tBodies[0];
          var rows = Array.prototype.slice.call(body.rows);
          rows.sort(function (a, b) { return compare(a.cells[column], b.cells[column]) * (falling ? -1 : 1); });
          rows.forEach(function (row) { body.appendChild(row); });
        });
      });
    });
  }
  function compare(a, b) {
    var x = a.dataset.value, y = b.dataset.value;
    if (x !== undefined && y !== undefined) return Number(x) - Number(y);
    if (x !== undefined || y !== undefined) return x !== undefined ? 1 : -1;
    return a.textContent.localeCompare(b.textContent, "en", { numeric: true });
  }

  // A place that a link names may be folded away

  function unfold() {
    var target = null;
    try { target = document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch (odd) { return; }
    if (!target) return;
    var folded = target.closest("details:not([open])");
    if (folded) { folded.open = true; target.scrollIntoView(); }
  }

  // While a job runs, the page loads itself anew and comes back to its place

  function setUpReloading() {
    var seconds = Number(document.body.dataset.reloadSeconds);
    if (!seconds) return;
    var key = "rope_probe-scroll " + location.pathname;
    var place = remembered("sessionStorage", key);
    if (place !== null && !location.hash) window.scrollTo(0, Number(place));
    var button = document.getElementById("reloading");
    var going = remembered("sessionStorage", "rope_probe-reloading") !== "false";
    function say() { button.setAttribute("aria-pressed", String(going)); }
    say();
    button.addEventListener("click", function () {
      going = !going;
      remember("sessionStorage", "rope_probe-reloading", String(going));
      say();
    });
    window.setInterval(function () {
      if (!going || document.hidden) return;
      remember("sessionStorage", key, String(window.scrollY));
      location.reload();
    }, seconds * 1000);
  }

  setUpTheme();
  setUpTabs();
  setUpSorting();
  setUpFigures();
  setUpReloading();
  unfold();
  window.addEventListener("hashchange", unfold);
})();
