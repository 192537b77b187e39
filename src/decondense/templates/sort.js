for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.rows[0].querySelectorAll("th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const by = a - b;
        return (Number.isNaN(by) ? a.localeCompare(b) : by) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
    });
  });
}
