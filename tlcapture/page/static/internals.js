"use strict";
// Internals: what each layer adds to the residual stream, and what was stored of a layer: hooks, neurons, heads, experts.
tl.views.internals = {
  title: "Internals",
  create(container) {
    const { element, colours } = tl;
    const controls = element("div", { className: "controls" }), inside = element("div", { className: "controls" }), tables = element("div", { className: "tables" }), absent = element("div"), notes = element("p", { className: "note" });
    const added = tl.figure({ name: "contributions", height: 280, onClick: (point) => tl.state.set({ layer: Math.round(point.x) }) });
    const norms = tl.figure({ name: "internals_norms", height: 400, onClick: (point) => tl.state.set({ token: tokenAt(point.x), hook: point.y }) });
    const router = tl.figure({ name: "router_scores", height: 320, onClick: (point) => tl.state.set({ token: tokenAt(point.x) }) });
    container.append(controls, added.element, notes, inside, absent, norms.element, router.element, tables);
    const tokenAt = (x) => Math.round(x);
    const WAYS = { norm: "norm of what is added", share: "norm, relative to the stream", trait: "projection onto the trait" };
    const COLOURS = ["#d65d0e", "#2f7ed8"];

    const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

    /** What attention and MLP of each layer add, by layer, at the chosen token or on average over the response. */
    async function addedOf(state, data) {
      const averaged = (at) => (state.token !== null ? at(state.token) : mean(data.tokens.map((_, token) => token).filter((token) => token >= Math.max(1, data.n_prompt_tokens)).map(at).filter((value) => value !== null && value !== undefined)));
      if (state.added === "trait") {
        const { scores, sublayers } = await tl.source.layers(state), index = (name) => sublayers.indexOf(name);
        if (["residual_in", "after_attn", "residual_out"].some((name) => index(name) < 0)) throw new tl.source.Missing({ what: "the projection has not all three residual points" });
        const step = (from, to) => (layer) => averaged((token) => (scores[token]?.[layer] ? scores[token][layer][index(to)] - scores[token][layer][index(from)] : null));
        const layers = Array.from({ length: scores[0].length }, (_, layer) => layer);
        return { layers, parts: { attention: layers.map(step("residual_in", "after_attn")), MLP: layers.map(step("after_attn", "residual_out")) }, unit: `projection onto ${state.trait}` };
      }
      const found = await tl.source.contributions(state), column = new Map(found.tokens.map((token, index) => [token, index])), isShare = state.added === "share";
      const of = (rows) => found.layers.map((_, index) => (rows[index] === null ? null : averaged((token) => {
        if (!column.has(token)) return null;
        const value = rows[index][column.get(token)];
        return isShare ? value / (found.stream[index]?.[column.get(token)] || 1) : value;
      })));
      return { layers: found.layers, parts: { attention: of(found.attn), MLP: of(found.mlp) }, unit: isShare ? "share of the stream's norm" : "norm" };
    }

    async function drawAdded(state, data) {
      controls.replaceChildren(tl.choice("of each layer", Object.entries(WAYS).filter(([key]) => key !== "trait" || state.trait), state.added, (value) => tl.state.set({ added: value })),
        element("button", { "aria-pressed": state.token === null ? "true" : "false", onclick: () => tl.state.set({ token: null }) }, "mean over the response"));
      const { layers, parts, unit } = await addedOf(state, data);
      const where = state.token === null ? "mean over the response" : `token ${state.token} ${tl.plain(tl.quoted(data.labels[state.token]))}`;
      const traces = Object.entries(parts).map(([name, values], number) => ({ type: "bar", x: layers, y: values, name, marker: { color: COLOURS[number] }, hovertemplate: `layer %{x}, ${name}: %{y:.4~g}<extra></extra>` }));
      await added.draw(traces, {
        title: `what each layer adds to the residual stream: ${where}`, barmode: "group", showlegend: true, legend: { orientation: "h", y: 1.12, x: 1, xanchor: "right" },
        xaxis: { title: "layer" }, yaxis: { title: tl.plain(unit) }, shapes: state.layer === null ? [] : [tl.lineAt(state.layer, colours.css("--accent"))],
      });
      notes.textContent = state.added === "trait" ? "The change of the projection onto the trait's vector within a layer: what its attention and its MLP write in that direction." : "The length of what attention and MLP write, from the activations as they were stored. Layers whose points were not kept have no bar.";
    }

    /** The norm of every hook of a layer at every token, each row on a scale of its own. */
    async function drawNorms(state, data, layer, found) {
      const names = Object.keys(found.hooks), text = found.tokens.map((token) => `${token} ${tl.plain(tl.quoted(data.labels[token] ?? ""))}`);
      const most = (values) => values.reduce((largest, value, index) => (found.tokens[index] === 0 ? largest : Math.max(largest, value)), 0) || 1;
      await norms.draw([{
        type: "heatmap", x: found.tokens, y: names, z: names.map((name) => found.hooks[name].norms.map((value) => value / most(found.hooks[name].norms))), zmin: 0, zmax: 1,
        text: names.map(() => text), customdata: names.map((name) => found.hooks[name].norms.map((value) => tl.number(value))), colorscale: colours.amountScale(), colorbar: colours.bar("norm / largest of the hook"), hovertemplate: "%{text}<br>%{y}: norm %{customdata}<extra></extra>",
      }], { title: `layer ${layer}: norm of each hook at each token`, xaxis: { title: "token" }, yaxis: { autorange: "reversed" }, shapes: [tl.lineAt(data.n_prompt_tokens - 0.5, colours.css("--text"), "dash", 1), ...(state.token === null ? [] : [tl.lineAt(state.token, colours.css("--accent"))])] });
    }

    async function drawRouter(state, data, layer, found) {
      router.element.hidden = !found.router;
      if (!found.router) return;
      const flat = found.router.flat(), size = flat.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
      await router.draw([{ type: "heatmap", x: found.tokens, z: found.router, zmin: -size, zmax: size, colorscale: colours.divergingScale(), colorbar: colours.bar("router score"), hovertemplate: "token %{x}, expert %{y}: %{z:.4~g}<extra></extra>" }],
        { title: `layer ${layer}: the router's score of every expert`, xaxis: { title: "token" }, yaxis: { title: "expert" }, shapes: state.token === null ? [] : [tl.lineAt(state.token, colours.css("--accent"))] });
    }

    const table = (caption, head, rows) => element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, head.map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, rows.map((cells) => element("tr", {}, cells.map((text) => element("td", {}, String(text)))))));

    function drawToken(state, data, layer, token, found, nNeurons) {
      const where = `layer ${layer}, token ${token} ${tl.quoted(data.labels[token])}`, made = [];
      if (found.neurons) made.push(table(`The ${found.neurons.length} most active of ${nNeurons} neurons (${tl.number(100 * found.share, 2)} % of the squared norm), ${where}`, ["neuron", "activation", "before the nonlinearity"], found.neurons.map((each) => [each.neuron, tl.number(each.post), tl.number(each.pre)])));
      if (found.experts) made.push(table(`Experts by the router's score, ${where}`, ["expert", "score", "share (softmax)"], found.experts.slice(0, 12).map((each) => [each.expert, tl.number(each.score), tl.number(each.share, 3)])));
      if (found.heads) made.push(table(`What each head mixed, ${where}`, ["head", "norm"], found.heads.map((norm, head) => [head, tl.number(norm)])));
      tables.replaceChildren(...made);
    }

    async function drawStored(state, data) {
      const { layers } = await tl.source.internals(state);
      const wish = state.layer ?? layers[layers.length - 1], layer = layers.reduce((best, each) => (Math.abs(each - wish) < Math.abs(best - wish) ? each : best));
      const found = await tl.source.internalsLayer(state, layer), names = Object.keys(found.hooks);
      const hook = names.includes(state.hook) ? state.hook : names.includes("mlp.hook_post") ? "mlp.hook_post" : names[names.length - 1];
      const wanted = state.token ?? Math.min(data.n_prompt_tokens, data.tokens.length - 1), token = found.tokens.includes(wanted) ? wanted : found.tokens[0];
      inside.replaceChildren(tl.choice("stored layer", layers.map((each) => [String(each), String(each)]), String(layer), (value) => tl.state.set({ layer: Number(value) })),
        tl.choice("colour of the text: norm of", names.map((name) => [name, name]), hook, (value) => tl.state.set({ hook: value })),
        ...(layer !== wish ? [element("span", { className: "note" }, `layer ${wish} was not stored`)] : []));
      const byToken = new Map(found.tokens.map((each, index) => [each, found.hooks[hook].norms[index]])), line = data.tokens.map((_, index) => byToken.get(index) ?? null), most = colours.reach(line);
      tl.reading.paint((index) => colours.amount(line[index], most), (index) => tl.number(line[index]), `norm of ${hook}, layer ${layer}`, colours.scale("amount", 0, most));
      drawToken(state, data, layer, token, await tl.source.internalsToken(state, layer, token), found.n_neurons);
      await Promise.all([drawNorms(state, data, layer, found), drawRouter(state, data, layer, found)]);
    }

    /** Draw a part, or say in its place what is missing. */
    async function part(draw, own, box) {
      try {
        await draw();
        own.forEach((each) => { each.hidden = false; });
        box.replaceChildren();
        return true;
      } catch (error) {
        if (!(error instanceof tl.source.Missing)) throw error;
        own.forEach((each) => { each.hidden = true; });
        box.replaceChildren(tl.emptyState(error));
        return false;
      }
    }

    const absentAbove = element("div");
    container.prepend(absentAbove);

    return {
      async update(state, changed, data) {
        router.element.hidden = true;
        tl.reading.paint(() => "", () => "", "");
        await part(() => drawAdded(state, data), [added.element, notes], absentAbove);
        await part(() => drawStored(state, data), [inside, norms.element, tables], absent);
      },
      remove() {
        for (const each of [added, norms, router]) each.remove();
      },
    };
  },
};
