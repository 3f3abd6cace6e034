"use strict";
(() => {
  const rows = [...document.querySelectorAll("tr[data-row]")];

  // A click on the head of a column sorts its table; a second one turns the order round. Figures begin with the largest.
  const key = (row, column) => {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent.trim();
    return cell.dataset.value === "" ? -Infinity : Number(cell.dataset.value);
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a === b ? 0 : a < b ? -1 : 1);
  for (const head of document.querySelectorAll("thead th")) {
    head.addEventListener("click", () => {
      const table = head.closest("table");
      const body = table.tBodies[0];
      const isText = head.classList.contains("wide") || head.cellIndex === 0;
      const first = isText ? "ascending" : "descending";
      const second = isText ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const sorted = [...body.rows].sort((a, b) => sign * compare(key(a, head.cellIndex), key(b, head.cellIndex)));
      body.append(...sorted);
    });
  }

  // One box searches the texts of all lists.
  const box = document.getElementById("search");
  const told = document.querySelector(".search output");
  const texts = rows.map((row) => row.querySelector("td.wide > .text").textContent.toLowerCase());
  const search = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      shown += !row.hidden;
    });
    told.value = words.length ? `${shown} of ${rows.length} lines` : "";
  };
  box.addEventListener("input", search);
  box.form.addEventListener("submit", (event) => event.preventDefault());

  // Paper cannot be unfolded.
  const folded = () => [...document.querySelectorAll("details:not([open])")];
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = folded();
    for (const details of unfolded) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of unfolded) details.open = false;
  });
})();
