// The theme that was chosen, set before anything is painted. Storage may be refused, as some browsers do for files.
(function () {
  "use strict";
  var root = document.documentElement;
  var chosen = null;
  try { chosen = window.localStorage.getItem("rope_probe-theme"); } catch (refused) { /* the system's, then */ }
  root.classList.add("js");
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
})();
