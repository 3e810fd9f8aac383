// A click on the head of a column sorts the table by it, and a second click the other way round.
// Cells that begin with a number or a time are compared as such, other cells as text; empty ones come last.
const SECONDS = { h: 3600, min: 60, s: 1 };

function sortNumber(text) {
  if (/^\d+(\.\d+)? (h|min|s)\b/.test(text)) {
    const parts = text.split("/")[0].matchAll(/(\d+(?:\.\d+)?) (h|min|s)\b/g);
    return [...parts].reduce((sum, [, count, unit]) => sum + count * SECONDS[unit], 0);
  }
  const found = /^[^\d\p{L}]*?([-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)/u.exec(text);
  return found ? parseFloat(found[1].replaceAll(",", "").replace("−", "-")) : NaN;
}

function compareCells(one, other, sign) {
  const empty = [one, other].map((text) => text === "" || text === "–");
  if (empty[0] || empty[1]) return empty[0] - empty[1];
  const [a, b] = [sortNumber(one), sortNumber(other)];
  if (Number.isNaN(a) && Number.isNaN(b)) return sign * one.localeCompare(other);
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return sign * (a - b);
}

function sortTable(body, column, sign) {
  const text = (row) => (row.cells[column] ? row.cells[column].textContent.trim() : "");
  body.append(...[...body.rows].sort((a, b) => compareCells(text(a), text(b), sign)));
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".bd-article table").forEach((table) => {
    const body = table.tBodies[0];
    if (!table.tHead || !body || body.rows.length < 4) return;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.textContent.trim()) return;
      const button = document.createElement("button");
      button.className = "kd-sort";
      button.type = "button";
      button.title = "Sort by this column";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        sortTable(body, column, up ? 1 : -1);
      });
    });
  });
});
