"use strict";
// Layers: the projection of every token at every layer, at one or all residual points.
tl.views.layers = {
  title: "Layers",
  create(container) {
    const { element, colours } = tl;
    const controls = element("div", { className: "controls" }), heats = element("div"), notes = element("div");
    let figures = new Map(), found = null, own = null, kept = [];
    const profile = tl.figure({ name: "layer_profile", height: 260, onClick: (point) => tl.state.set({ layer: Math.round(point.x) }) });
    container.append(controls, heats, profile.element, notes);

    function marks(state) {
      const shapes = [tl.lineAt(own.n_prompt_tokens - 0.5, colours.css("--text"), "dash", 1)];
      shapes.push(tl.levelAt(own.layer, colours.css("--text"), "dot"));
      if (state.token !== null) shapes.push(tl.lineAt(state.token, colours.css("--accent")));
      if (state.layer !== null) shapes.push(tl.levelAt(state.layer, colours.css("--accent")));
      return shapes;
    }

    /** The end of the colour scale: the 99th percentile of absolute values after the first token, so that no outlier dominates it. */
    function reachOf(grids) {
      const sizes = grids.flatMap((grid) => grid.flatMap((row) => row.slice(1))).filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
      return sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || 1 : 1;
    }

    function drawProfile(state, data) {
      const token = state.token ?? Math.min(data.n_prompt_tokens, data.tokens.length - 1);
      const traces = found.sublayers.map((name, index) => ({
        x: kept, y: kept.map((layer) => found.scores[token][layer]?.[index] ?? null), name, mode: "lines",
        line: { width: name === state.point ? 2.5 : 1.2, dash: ["dot", "dash", "solid"][index + 3 - found.sublayers.length] },
        hovertemplate: `layer %{x}<br>${name} %{y:.4~g}<extra></extra>`,
      }));
      return profile.draw(traces, {
        title: `by layer at token ${token} ${tl.plain(tl.quoted(data.labels[token]))}`, showlegend: true,
        legend: { orientation: "h", y: 1.12, x: 1, xanchor: "right" }, xaxis: { title: "layer" },
        shapes: state.layer === null ? [] : [tl.lineAt(state.layer, colours.css("--accent"))],
      });
    }

    return {
      async update(state, changed, data) {
        const projection = tl.projectionOf(data, state);
        if (!projection) throw await tl.source.notProjected(data, state);
        const latest = await tl.source.layers(state);
        const same = found === latest && !"response,trait,prompt,set,experiment,component,point,theme".split(",").some((key) => changed.has(key));
        found = latest;
        own = { n_prompt_tokens: data.n_prompt_tokens, layer: projection.vector.layer };
        const nLayers = found.scores[0].length, points = found.sublayers;
        kept = found.layers ?? found.scores[0].flatMap((scores, at) => (scores === null ? [] : [at])); // null: the capture did not keep the layer
        const wish = state.layer ?? own.layer;
        const layer = kept.reduce((best, each) => (Math.abs(each - wish) < Math.abs(best - wish) ? each : best));
        const point = points.includes(state.point) ? state.point : points[points.length - 1];
        const line = found.scores.map((token) => token[layer]?.[points.indexOf(point)] ?? null); // null: the capture did not keep the token
        const most = colours.reach(line);
        tl.reading.paint((index) => colours.diverging(line[index], most), (index) => tl.number(line[index]), `${state.trait} at layer ${layer}, ${point}`, colours.scale("diverging", -most, most));
        if (same) {
          for (const figure of figures.values()) figure.mark(marks(state));
          return drawProfile(state, data);
        }
        controls.replaceChildren(points.length > 1
          ? tl.choice("residual point", [...points.map((each) => [each, each]), ["all", "all points"]], state.point === "all" ? "all" : point, (value) => tl.state.set({ point: value }))
          : element("span", { className: "note" }, points[0]));
        const wanted = state.point === "all" ? points : [point];
        for (const figure of figures.values()) figure.remove();
        figures = new Map(wanted.map((name) => [name, tl.figure({ name: `layers_${name}`, height: wanted.length > 1 ? 300 : 430, onClick: (at) => tl.state.set({ token: at.x, layer: at.y }) })]));
        heats.replaceChildren(...[...figures.values()].map((figure) => figure.element));
        const grids = wanted.map((name) => Array.from({ length: nLayers }, (_, at) => found.scores.map((token) => (token[at] === null ? null : token[at][points.indexOf(name)]))));
        const reach = reachOf(grids), text = tl.numbered(data.labels);
        notes.replaceChildren(tl.note(`Projection onto the vector of layer ${own.layer} (dotted) at every layer${kept.length < nLayers ? ` that the capture kept (${kept.join(", ")})` : ""}. The colour scale ends at \u00b1${tl.number(reach, 3)}, the 99th percentile without the first token, an attention sink.${projection.kept ? ` Of this capture, ${projection.kept}.` : ""}`));
        await Promise.all([...wanted.map((name, number) => figures.get(name).draw([{
          type: "heatmap", z: grids[number], text: Array(nLayers).fill(text), zmin: -reach, zmax: reach, zmid: 0, colorscale: colours.divergingScale(), colorbar: colours.bar("projection"),
          hovertemplate: "%{text}<br>layer %{y}: %{z:.4~g}<extra></extra>",
        }], { title: `${state.trait}: ${name}`, xaxis: { title: "token" }, yaxis: { title: "layer" }, shapes: marks(state) })), drawProfile(state, data)]);
      },
      remove() {
        for (const figure of figures.values()) figure.remove();
        profile.remove();
      },
    };
  },
};
