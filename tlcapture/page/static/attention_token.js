"use strict";
// Attention of the chosen token: a summary of every head, and the weights of one head over the text.
tl.attention.token = {
  create(container) {
    const { element, colours } = tl;
    const MEASURES = {
      entropy: ["entropy (nats)", (weights) => -weights.reduce((sum, weight) => sum + (weight > 0 ? weight * Math.log(weight) : 0), 0)],
      first: ["weight on the first token", (weights) => weights[0]],
      prompt: ["weight on the prompt after its first token", (weights, nPrompt) => weights.slice(1, nPrompt).reduce((sum, weight) => sum + weight, 0)],
      self: ["weight on itself", (weights) => weights[weights.length - 1]],
      largest: ["largest weight after the first token", (weights) => weights.slice(1).reduce((most, weight) => Math.max(most, weight), 0)],
    };
    const controls = element("div", { className: "controls" });
    const grid = tl.figure({ name: "attention_heads", height: 460, onClick: (point) => tl.state.set({ layer: point.y, head: point.x, mean: false }) });
    const pattern = tl.figure({ name: "attention_pattern", height: 460, onClick: (point) => tl.state.set({ token: point.x }) });
    container.append(controls, element("div", { className: "side-by-side" }, grid.element, pattern.element));

    return {
      async update(state, changed, data) {
        const { positions, kept, kept_layers: keptLayers } = await tl.source.attention(state);
        const token = Math.min(state.token ?? (positions ? positions[0] ?? 0 : data.n_prompt_tokens), data.tokens.length - 1);
        if (positions && !positions.includes(token)) throw new tl.source.Missing({ what: `of this capture, ${kept}: not token ${token}` });
        const { by_layer: layers } = await tl.source.attentionToken(state, token);
        // Layers without attention, in hybrid models, are null.
        const present = layers.flatMap((heads, index) => (heads ? [index] : []));
        const nHeads = layers[present[0]].length;
        const layer = present.findLast((index) => index <= (state.layer ?? layers.length - 1)) ?? present[0], head = Math.min(state.head ?? 0, nHeads - 1);
        const weights = layers[layer][head];
        const measure = MEASURES[state.measure] ? state.measure : "entropy";
        const [label, of] = MEASURES[measure];
        const most = weights.slice(1).reduce((largest, weight) => Math.max(largest, weight), 0.02);
        tl.reading.paint((index) => colours.amount(weights[index] ?? null, most), (index) => (index <= token ? tl.number(weights[index]) : "later token"), `attention of token ${token}, layer ${layer}, head ${head}`, colours.scale("amount", 0, most));
        controls.replaceChildren(
          tl.choice("colour of a head", Object.entries(MEASURES).map(([key, [text]]) => [key, text]), measure, (value) => tl.state.set({ measure: value })),
          tl.choice("layer", present.map((index) => [String(index), String(index)]), String(layer), (value) => tl.state.set({ layer: Number(value) })),
          tl.choice("head", layers[layer].map((_, index) => [String(index), String(index)]), String(head), (value) => tl.state.set({ head: Number(value) })),
          ...(keptLayers ? [element("span", { className: "note" }, `kept: layers ${keptLayers.join(", ")}`)] : []));
        const frame = { type: "rect", x0: head - 0.5, x1: head + 0.5, y0: layer - 0.5, y1: layer + 0.5, line: { color: colours.css("--accent"), width: 2.5 } };
        const hover = weights.map((_, index) => `${index} ${tl.plain(tl.quoted(data.labels[index]))}`);
        await Promise.all([
          grid.draw([{
            type: "heatmap", z: layers.map((heads) => (heads ?? Array(nHeads).fill(null)).map((each) => each && of(each, data.n_prompt_tokens))), colorscale: colours.amountScale(), colorbar: colours.bar(label),
            hovertemplate: "layer %{y}, head %{x}: %{z:.3~g}<extra></extra>",
          }], { title: `${label} at token ${token} ${tl.plain(tl.quoted(data.labels[token]))}`, xaxis: { title: "head", dtick: nHeads > 16 ? 4 : 1 }, yaxis: { title: "layer" }, shapes: [frame] }),
          pattern.draw([{ type: "bar", y: weights, text: hover, marker: { color: "rgb(126,70,190)" }, textposition: "none", hovertemplate: "%{text}: %{y:.3~g}<extra></extra>" }], {
            title: `layer ${layer}, head ${head}: weight on each token`, xaxis: { title: "token", range: [-0.5, data.tokens.length - 0.5] }, yaxis: { range: [0, 1] },
            shapes: [tl.lineAt(data.n_prompt_tokens - 0.5, colours.css("--faint"), "dash", 1), tl.lineAt(token, colours.css("--accent"))],
          }),
        ]);
      },
      remove() {
        grid.remove();
        pattern.remove();
      },
    };
  },
};
