"use strict";
const drawn = [];
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
  drawn.push(
    vegaEmbed(place, spec, { renderer: "svg", actions: false, tooltip: { theme: "custom" } }).then(({ view }) => {
      // A page printed or turned on its side has another width.
      new ResizeObserver(() => window.dispatchEvent(new Event("resize"))).observe(place.parentElement);
      return view;
    }),
  );
}
Promise.all(drawn).then(
  () => { document.body.dataset.drawn = drawn.length; },
  (error) => { console.error(error); },
);

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const given = row.cells[column].dataset.value;
        return given === undefined || given === "" ? null : Number.isNaN(Number(given)) ? given : Number(given);
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((first, second) => {
        const [a, b] = [value(first), value(second)];
        if (a === null || b === null) return (a === null) - (b === null); // what has no figure stays last
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
