"use strict";
// Logit lens: the next-token prediction of each layer, and the rank of the actual next token.
tl.views.lens = {
  title: "Logit lens",
  create(container) {
    const { element, colours } = tl;
    const overview = tl.figure({ name: "logit_lens", height: 270, onClick: (point) => tl.state.set({ token: point.x, layer: point.y }) });
    const controls = element("div", { className: "controls" }), cells = element("div", { className: "cells", tabIndex: 0, role: "region", "aria-label": "Predictions by layer" }), top = element("div", { className: "top", tabIndex: 0, role: "region", "aria-label": "Most likely tokens" });
    container.append(controls, overview.element, element("div", { className: "lens" }, cells, top));
    cells.addEventListener("click", (event) => {
      const cell = event.target.closest("td");
      if (cell) tl.state.set({ token: Number(cell.dataset.token), layer: Number(cell.dataset.layer) });
    });
    let drawn = null, latestTop = 0;

    const labelAfter = (data, lens, column) => data.labels[lens.token_idx[column] + 1] ?? lens.actual[column];

    function columnsAround(index, count, width) {
      const start = Math.max(0, Math.min(count - width, index - Math.floor(width / 2)));
      return Array.from({ length: Math.min(width, count) }, (_, number) => start + number);
    }

    /** The layer of each row of predictions: every layer, or those that were kept. */
    const layersOf = (lens) => lens.kept_layers ?? Array.from({ length: lens.n_layers }, (_, layer) => layer);

    /** The table around the chosen token, with as many columns as fit. */
    function drawTable(state, data, lens, at, chosenRow) {
      const layers = layersOf(lens);
      const columns = columnsAround(at, lens.token_idx.length, Math.max(4, Math.floor((cells.clientWidth || 900) / 84)));
      const head = (text, of, title) => element("tr", {}, element("th", {}, text), columns.map((column) => element("th", { title: title(column) }, of(column))));
      const rows = [];
      for (let row = layers.length - 1; row >= 0; row--) {
        rows.push(element("tr", {}, element("th", {}, String(layers[row])), columns.map((column) => {
          const rank = lens.rank[column][row];
          const chosen = column === at && row === chosenRow;
          return element("td", {
            className: `${rank === 1 ? "hit" : ""} ${chosen ? "chosen" : ""}`, "data-token": String(lens.token_idx[column]), "data-layer": String(layers[row]),
            style: { backgroundColor: colours.amount(lens.prob[column][row], 1.4) },
            title: `layer ${layers[row]}, after token ${lens.token_idx[column]}: ${tl.quoted(lens.top[column][row])} ${tl.number(lens.prob[column][row])}; the actual next token ${tl.quoted(lens.actual[column])} has rank ${rank} (${tl.number(lens.actual_prob[column][row])})`,
          }, element("small", { style: { backgroundColor: colours.rank(rank) } }, rank === 1 ? "" : `#${rank}`), tl.visible(lens.top[column][row]));
        })));
      }
      cells.replaceChildren(element("table", {}, element("thead", {}, head("token", (column) => tl.visible(data.labels[lens.token_idx[column]]), (column) => String(lens.token_idx[column])),
        head("next", (column) => tl.visible(labelAfter(data, lens, column)), () => "the actual next token")), element("tbody", {}, rows)),
        tl.note(`Violet: probability of the most likely token. Green: rank of the actual next token (#); bold if it is 1. Click a cell to list the top ${lens.top_k}.${lens.kept_layers ? ` Kept: layers ${layers.join(", ")}.` : ""}`));
    }

    async function drawTop(state, lens, at, row) {
      const request = ++latestTop;
      const entry = await tl.source.lensToken(state, lens.token_idx[at]);
      if (request !== latestTop) return;
      const found = entry.by_layer[row], layer = layersOf(lens)[row];
      const rows = found.top_k.map(({ token, prob }, index) => element("tr", { style: { backgroundColor: colours.amount(prob) } },
        element("td", {}, String(index + 1)), element("td", {}, tl.visible(token)), element("td", {}, tl.number(prob))));
      top.replaceChildren(tl.note(`Layer ${layer} after token ${lens.token_idx[at]}: the ${rows.length} most likely tokens. Actual next token: ${tl.quoted(entry.actual_next_token)}, rank ${found.actual_rank}, ${tl.number(found.actual_prob)}.`),
        element("table", {}, element("tbody", {}, rows)));
    }

    return {
      async update(state, changed, data) {
        const lens = await tl.source.lens(state);
        if (!lens.token_idx.length) throw new tl.source.Missing({ what: lens.kept ? `of this capture, ${lens.kept}, none of which has a next one` : "a capture of one token has no next token to predict" });
        const layers = layersOf(lens), nLayers = layers.length;
        const row = Math.max(0, layers.findLastIndex((each) => each <= (state.layer ?? lens.n_layers - 1))), layer = layers[row];
        const at = Math.max(0, Math.min(lens.token_idx.length - 1, lens.token_idx.indexOf(state.token ?? Math.max(0, data.n_prompt_tokens - 1))));
        const ofLayer = new Map(lens.token_idx.map((token, index) => [token + 1, index]));
        const probability = (index) => (ofLayer.has(index) ? lens.actual_prob[ofLayer.get(index)][row] : null);
        const rankOf = (index) => (ofLayer.has(index) ? lens.rank[ofLayer.get(index)][row] : null), byRank = state.by === "rank";
        controls.replaceChildren(tl.choice("colour of the text", [["probability", "probability"], ["rank", "rank"]], byRank ? "rank" : "probability", (by) => tl.state.set({ by })));
        tl.reading.paint((index) => (byRank ? colours.rank(rankOf(index)) : colours.amount(probability(index))),
          (index) => (ofLayer.has(index) ? `p ${tl.number(probability(index))}, rank ${rankOf(index)}` : ""), `${byRank ? "rank" : "probability"} of each token, predicted from the token before it, at layer ${layer}`, byRank ? colours.scale("rank", 1, 100000) : colours.scale("amount", 0, 1));
        const shapes = [tl.lineAt(data.n_prompt_tokens - 0.5, colours.css("--text"), "dash", 1), tl.lineAt(lens.token_idx[at], colours.css("--accent")), tl.levelAt(layer, colours.css("--accent"))];
        drawTable(state, data, lens, at, row);
        const jobs = [drawTop(state, lens, at, row)];
        if (drawn === lens && !changed.has("theme") && !changed.has("response")) jobs.push(overview.mark(shapes));
        else {
          const ranks = Array.from({ length: nLayers }, (_, row) => lens.rank.map((token) => Math.log10(token[row])));
          const text = Array.from({ length: nLayers }, (_, row) => lens.token_idx.map((token, index) => `${token} ${tl.plain(tl.quoted(data.labels[token]))}: next ${tl.plain(tl.quoted(labelAfter(data, lens, index)))}<br>rank ${lens.rank[index][row]}; first ${tl.plain(tl.quoted(lens.top[index][row]))}`));
          drawn = lens;
          jobs.push(overview.draw([{
            type: "heatmap", x: lens.token_idx, y: layers, z: ranks, text, zmin: 0, zmax: 5, colorscale: colours.rankScale(),
            colorbar: { ...colours.bar("rank"), tickvals: [0, 1, 2, 3, 4, 5], ticktext: ["1", "10", "100", "1k", "10k", "100k"] },
            hovertemplate: "layer %{y}, token %{text}<extra></extra>",
          }], { title: "rank of the actual next token", xaxis: { title: "token" }, yaxis: { title: "layer" }, shapes }));
        }
        await Promise.all(jobs);
      },
      remove: () => overview.remove(),
    };
  },
};
