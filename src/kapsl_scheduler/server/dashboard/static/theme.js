// Runs before anything is painted, so that the page does not flash in the other colours. What is not here: the switch
// (shell.js).
"use strict";
{
  const chosen = localStorage.getItem("kapsl-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
