"use strict";
// Difference: two captures of the same prompt, token by token and layer by layer, as `tlcapture compare` stored it.
/** The name of compared captures, as `tlcapture compare` takes it, from the name of their folder. */
tl.comparedName = (other, set) => (other.includes("+") ? other.replaceAll("+", "/") : other.replace("@", `/${set.split("@")[0]}@`));

tl.views.difference = {
  title: "Difference",
  ownText: true,
  create(container) {
    const { element, colours } = tl;
    const controls = element("div", { className: "controls" }), facts = element("div"), box = element("div"), rest = element("div", { className: "side-by-side" });
    const most = element("div"), notes = element("div");
    const line = tl.figure({ name: "difference", height: 240, onClick: (point) => tl.state.set({ token: point.x }) });
    const heat = tl.figure({ name: "difference_layers", height: 380, onClick: (point) => tl.state.set({ token: point.x, layer: point.y }) });
    container.append(controls, box, rest, line.element, heat.element, most, facts, notes);
    const strip = tl.strip(box, (token) => tl.state.set({ token }));
    let found = null, drawn = "";

    const QUANTITIES = [["trait", "projection"], ["kl", "next token (KL)"], ["turn", "residual: 1 \u2212 cosine"], ["ratio", "residual: norm ratio"]];

    /** What is known of each token, with its label and whether it may be negative. */
    function quantityOf(state, layer) {
      const trait = found.traits[state.trait];
      const at = (rows, change) => rows.map((row) => (row === null || row[layer] === null ? null : change(row[layer])));
      const all = {
        trait: trait && { values: trait.difference, label: `${state.trait}: projection of b less that of a`, signed: true },
        kl: found.kl && { values: found.kl, label: "next token: D(a || b) in nats", signed: false },
        turn: { values: at(found.residual.cosine, (value) => 1 - value), label: `residual of layer ${layer}: 1 \u2212 cosine`, signed: false },
        ratio: { values: at(found.residual.norm_ratio, (value) => Math.log2(value || 1)), label: `residual of layer ${layer}: log2 of the norm of b over that of a`, signed: true },
      };
      return all[state.quantity] ?? all.trait ?? all.kl ?? all.turn;
    }

    const marks = (state) => [tl.lineAt(found.n_prompt_tokens - 0.5, colours.css("--faint"), "dash", 1), ...(state.token === null ? [] : [tl.lineAt(state.token, colours.css("--accent"))])];

    /** The tokens of the response that differ most, or of the prompt where there is no response. */
    function drawMost({ values, label }) {
      const first = found.n_prompt_tokens < found.tokens.length ? found.n_prompt_tokens : 1;
      const top = values.map((value, index) => [value, index]).filter(([value, index]) => value && index >= first).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 8);
      most.replaceChildren(tl.note(top.length ? `Tokens that differ most (${label}):` : "No token differs."), element("div", { className: "chips" },
        top.map(([value, index]) => element("button", { onclick: () => tl.state.set({ token: index }) }, `${index} ${tl.quoted(found.tokens[index])} ${tl.number(value, 3)}`))));
    }

    function drawRest() {
      const sides = found.continuations;
      rest.replaceChildren(...(sides ? ["a", "b"].map((side) => element("div", {}, element("b", {}, `${side} goes on: ${found[side]}`), element("div", { className: "strip" }, sides[side].map((token) => element("span", { className: "token" }, tl.visible(token)))))) : []));
    }

    function drawSummary(summary) {
      const cells = (name, change) => [name, change.n ? tl.number(change.mean, 3) : "unknown", change.interval ? `${tl.number(change.interval[0], 3)} to ${tl.number(change.interval[1], 3)}` : "\u2013", change.p === null ? "\u2013" : (Math.round(change.p * 1000 - 1e-9) / 1000).toFixed(3), change.stands_out ? "stands out" : "within chance"];
      const rows = Object.entries(summary.traits).map(([name, change]) => element("tr", {}, cells(name, change).map((text) => element("td", {}, text))));
      const samples = summary.n_files > summary.n_prompts ? `, ${summary.n_files} samples` : "";
      const cut = summary.n_cut ? ` ${summary.n_cut} of ${summary.n_files} pairs of captures differ from some token on: token by token, only their beginnings are compared.` : "";
      const isApart = summary.n_apart === summary.n_files;
      const apart = summary.n_apart ? ` ${summary.n_apart} of ${summary.n_files} pairs share no token of the response: what is said of them by token is of their prompts.` : "";
      facts.replaceChildren(element("p", {}, element("b", {}, `${summary.b} less ${summary.a}`), `, ${summary.n_prompts} prompts${samples}`),
        rows.length ? element("table", {}, element("thead", {}, element("tr", {}, ["trait", "change", "95 % interval", "p", "finding"].map((text) => element("th", {}, text)))), element("tbody", {}, rows)) : null,
        tl.note(`Change: of the mean projection over the response. p: the largest of sign flips over prompts, a t test of the mean and random directions${rows.length > 1 ? `, corrected for ${rows.length} traits, as intervals are` : ""}.${summary.kl ? ` Next token: ${tl.number(summary.kl.mean, 3)} nats, mean over the ${isApart ? "tokens of the prompts that captures share" : "responses"}.` : ""}${cut}${apart}`));
      notes.replaceChildren(...(summary.doubts ?? []).map((doubt) => tl.note(doubt)), ...summary.problems.map((problem) => tl.warning(problem)));
    }

    function drawHeat(state) {
      const isRatio = state.quantity === "ratio", rows = isRatio ? found.residual.norm_ratio : found.residual.cosine;
      const change = isRatio ? (value) => Math.log2(value || 1) : (value) => 1 - value, nLayers = rows.find((row) => row)?.length ?? 0;
      const z = Array.from({ length: nLayers }, (_, layer) => rows.map((row) => (row === null || row[layer] === null ? null : change(row[layer]))));
      const sizes = z.flatMap((values) => values.slice(1)).filter((value) => value !== null).map(Math.abs);
      const reach = sizes.reduce((most, size) => Math.max(most, size), 0) || 1, text = tl.numbered(found.tokens);
      return heat.draw([{ type: "heatmap", z, text: Array(nLayers).fill(text), zmin: isRatio ? -reach : 0, zmax: reach, colorscale: isRatio ? colours.divergingScale() : colours.amountScale(), colorbar: colours.bar(isRatio ? "log2 ratio" : "1 \u2212 cosine"), hovertemplate: "%{text}<br>layer %{y}: %{z:.4~g}<extra></extra>" }],
        { title: isRatio ? "log2 of the norm ratio of residual_out, by layer" : "1 \u2212 cosine of residual_out, by layer", xaxis: { title: "token" }, yaxis: { title: "layer" }, shapes: marks(state) });
    }

    return {
      async update(state) {
        const listed = (await tl.source.comparisons(state.experiment)).filter((each) => each.prompt_set === state.set).map((each) => each.other);
        if (!listed.length) throw new tl.source.Missing(await tl.source.uncompared(state));
        const other = listed.includes(state.other) ? state.other : listed[0];
        const summary = await tl.source.comparedSet(state, other);
        const names = summary.ids.filter((name) => name === state.prompt || name.startsWith(`${state.prompt}.s`));
        drawSummary(summary);
        const name = names.includes(state.prompt) ? state.prompt : names[0];
        if (!name) throw new tl.source.Missing({ what: `prompt ${state.prompt} was not compared with ${other}`, command: await tl.source.command(`tlcapture compare ${state.experiment}/${state.set} ${tl.comparedName(other, state.set)}`) });
        found = await tl.source.comparison(state, other, name);
        const nLayers = found.metadata.n_layers, layer = Math.min(state.layer ?? found.traits[state.trait]?.layer ?? nLayers - 1, nLayers - 1);
        const quantity = quantityOf(state, layer), reach = colours.reach(quantity.values);
        controls.replaceChildren(
          tl.picker("against", { options: listed.map((each) => ({ value: each, text: each })), value: other, choose: (value) => tl.state.set({ other: value }) }),
          tl.choice("colour", QUANTITIES.filter(([key]) => (key === "trait" ? found.traits[state.trait] : key !== "kl" || found.kl)), state.quantity, (value) => tl.state.set({ quantity: value })),
          element("span", { className: "note" }, `a: ${found.a}, b: ${found.b}`));
        const shown = JSON.stringify([state.experiment, state.set, other, name]);
        if (shown !== drawn) strip.show(found.tokens, found.n_prompt_tokens, []);
        drawn = shown;
        strip.paint((index) => (quantity.signed ? colours.diverging(quantity.values[index], reach) : colours.amount(quantity.values[index], reach)), (index) => tl.number(quantity.values[index]));
        strip.choose(state.token ?? -1);
        drawRest();
        drawMost(quantity);
        const text = tl.numbered(found.tokens);
        const trace = { x: quantity.values.map((_, index) => index), y: quantity.values.map((value, index) => (index ? value : null)), text, mode: "lines+markers", marker: { size: 4 }, line: { width: 1.8, color: "#a34fb5" }, hovertemplate: "%{text}<br>%{y:.4~g}<extra></extra>" };
        await Promise.all([
          line.draw([trace], { title: tl.plain(quantity.label), xaxis: { title: "token" }, shapes: marks(state) }),
          drawHeat(state),
        ]);
      },
      remove() {
        for (const each of [line, heat]) each.remove();
      },
    };
  },
};
