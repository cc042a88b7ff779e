"use strict";
// Every head on average over the response, as a table of layers by heads; a click opens the head's matrix.
tl.attention.heads = {
  create(container) {
    const { element, colours } = tl;
    const MEASURES = {
      entropy: ["entropy", "nats", "How widely a query's weights are spread: 0 if they are on one token."],
      distance: ["distance looked back", "tokens", "The mean number of tokens between a query and what it attends to."],
      first: ["weight on the first token", "share", "The first token is an attention sink: heads rest there."],
      previous: ["weight on the previous token", "share", "Near 1 in heads that look at the token before."],
      self: ["weight on itself", "share", "What a query puts on its own token."],
    };
    const controls = element("div", { className: "controls" }), most = element("div"), notes = element("p", { className: "note" });
    const table = element("div", { className: "scrolled", tabIndex: 0, role: "region", "aria-label": "Heads by layer" });
    container.append(controls, table, most, notes);

    const open = (layer, head) => tl.state.set({ layer, head, mean: false, mode: "matrix" });
    const cellAt = (layer, head) => table.querySelector(`td[data-layer="${layer}"][data-head="${head}"]`);

    table.addEventListener("click", ({ target }) => {
      const found = target.closest("td[data-head]");
      if (found) open(Number(found.dataset.layer), Number(found.dataset.head));
    });
    table.addEventListener("keydown", (event) => {
      const own = event.target.closest("td[data-head]");
      if (!own) return;
      const layer = Number(own.dataset.layer), head = Number(own.dataset.head);
      const [up, right] = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [0, 0];
      if (event.key === "Enter" || event.key === " ") open(layer, head);
      else if (up || right) {
        const next = cellAt(layer + up, head + right);
        if (next) {
          own.tabIndex = -1;
          next.tabIndex = 0;
          next.focus();
        }
      } else return;
      event.preventDefault();
      event.stopPropagation();
    });

    return {
      async update(state, changed, data) {
        const { measures, n_queries: nQueries, part } = await tl.source.attentionHeads(state);
        const measure = MEASURES[state.measure] ? state.measure : "entropy", [label, unit, what] = MEASURES[measure], rows = measures[measure];
        const known = rows.flatMap((row, layer) => row.flatMap((value, head) => (value === null ? [] : [{ layer, head, value }])));
        if (!known.length) throw new tl.source.Missing({ what: "the attention of no token after the first was kept" });
        const high = Math.max(...known.map((each) => each.value)), low = unit === "share" ? 0 : Math.min(...known.map((each) => each.value));
        controls.replaceChildren(tl.choice("measure", Object.entries(MEASURES).map(([key, [text]]) => [key, text]), measure, (value) => tl.state.set({ measure: value })),
          colours.scale("amount", low, high), element("span", { className: "note" }, `${label} (${unit})`));
        const chosen = known.some((each) => each.layer === state.layer && each.head === state.head) ? [state.layer, state.head] : [known[0].layer, known[0].head];
        const cell = (layer) => (value, head) => (value === null ? element("td", { className: "note" }, "\u2013") : element("td", {
          "data-layer": String(layer), "data-head": String(head), role: "gridcell", tabIndex: layer === chosen[0] && head === chosen[1] ? 0 : -1, className: layer === chosen[0] && head === chosen[1] ? "chosen" : "",
          style: { backgroundColor: colours.amount(value - low, (high - low || 1) * 1.15) }, title: `layer ${layer}, head ${head}: ${label} ${tl.number(value, 3)}`,
        }, tl.number(value, 2)));
        const body = rows.map((row, layer) => element("tr", { role: "row" }, element("th", { scope: "row", role: "rowheader" }, String(layer)), row.map(cell(layer)))).reverse();
        table.replaceChildren(element("table", { className: "heads", role: "grid", "aria-label": `${label} by layer and head` },
          element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, element("th", { scope: "col", role: "columnheader" }, "layer \\ head"), rows[0].map((_, head) => element("th", { scope: "col", role: "columnheader" }, String(head))))), element("tbody", { role: "rowgroup" }, body)));
        const top = [...known].sort((a, b) => b.value - a.value).slice(0, 8);
        most.replaceChildren(tl.note(`Largest ${label}:`), element("div", { className: "chips" }, top.map(({ layer, head, value }) => element("button", { onclick: () => open(layer, head) }, `layer ${layer}, head ${head}: ${tl.number(value, 3)}`))));
        notes.textContent = `${what} Means over ${nQueries} tokens of the ${part}. A click opens the head.`;
        tl.reading.paint(() => "", () => "", "");
      },
      remove() {},
    };
  },
};
