(() => {
  const table = document.querySelector("table.points"), body = table.tBodies[0], tools = document.querySelector(".tools");
  const [text, best] = tools.querySelectorAll("input"), status = tools.querySelector("[role=status]");
  const points = [...body.rows].filter(row => !row.classList.contains("base"));
  const done = points.filter(row => row.dataset.status === "done"), rest = points.filter(row => !done.includes(row));
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const known = done.filter(row => value(row, column) !== "–"), unknown = done.filter(row => !known.includes(row));
      known.sort((a, b) => (down ? -1 : 1) * compare(value(a, column), value(b, column)));
      body.append(...known, ...unknown, ...rest);
    });
  });
  const filter = () => {
    const wanted = text.value.toLowerCase().split(/\s+/);
    for (const row of points) {
      const said = (row.textContent + " " + row.cells[0].title).toLowerCase();
      row.hidden = (best.checked && row.dataset.frontier === undefined) || !wanted.every(word => said.includes(word));
    }
    status.textContent = `${points.filter(row => !row.hidden).length} of ${points.length} points`;
  };
  text.addEventListener("input", filter);
  best.addEventListener("change", filter);
  tools.hidden = false;
  filter();
})();
