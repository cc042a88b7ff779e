"use strict";
// Vectors: how well each method and layer separates held-out examples, how steering changes the model, which is selected and why.
tl.views.vectors = {
  title: "Vectors",
  withoutPrompt: true,
  create(container) {
    const { element, colours } = tl;
    const chosen = element("div"), matrix = element("div"), heats = element("div", { className: "side-by-side" }), curves = element("div", { className: "side-by-side" });
    container.append(chosen, heats, matrix, element("hr"), curves);
    let figures = [];
    const figure = (name, height) => {
      const made = tl.figure({ name, height });
      figures.push(made);
      return made;
    };

    function why(component, found) {
      const { selected, runner_up: rival } = found;
      if (!selected) return tl.warning(`${component}: ${found.problem}`);
      const reasons = {
        steering: "its steering run changes the trait most while the text stays coherent", effect_size: "it has the largest effect size",
        fallback: "vectors have been neither evaluated nor steered", override: "it was requested",
      };
      const score = selected.score === null ? "" : `, ${tl.number(selected.score)}`;
      const next = rival ? ` Next: ${rival.method} at layer ${rival.layer}, ${tl.number(rival.score)}.` : "";
      const { imported } = found.metadata;
      const made = imported ? ` Imported from ${imported.file}, ${imported.convention ?? "attention outputs"}.` : found.metadata.extraction_model ? ` From ${found.metadata.extraction_model}, read at ${found.metadata.position ?? "an unknown position"}.` : " Unknown origin: no metadata.json.";
      return element("p", {}, element("b", {}, component), `: ${selected.method} at layer ${selected.layer}${score}, because `, tl.term(selected.selected_by, reasons[selected.selected_by] ?? selected.selected_by), `.${next}${made}`,
        selected.warning ? element("span", { className: "warning" }, ` ${selected.warning}.`) : null);
    }

    // What the trait's vectors show beyond words, lengths and the embeddings.
    function verdict({ trait }) {
      if (!trait || !trait.verdict) return null;
      const deviation = trait.nested_sd === null ? "" : ` ± ${tl.number(trait.nested_sd)}`;
      const others = Object.entries(trait.baselines).map(([name, value]) => `${name} ${tl.number(value)}`).join(", ");
      return element("p", { className: "verdict" }, element("b", {}, "verdict"), `: ${trait.verdict}. AUROC ${tl.number(trait.nested_auroc)}${deviation} on pairs that chose nothing; without the model's layers: ${others}.`);
    }

    function drawMatrix(found) {
      matrix.replaceChildren(...(found.missing ? [tl.emptyState(found.missing)] : []));
      if (found.traits.length < 2) return [];
      const made = figure("cross_trait", 120 + 26 * found.traits.length);
      const [low, high] = found.by_chance ?? [];
      matrix.append(made.element, ...(found.by_chance ? [tl.note(`On another trait's examples, vectors lie within ${tl.number(low, 2)} to ${tl.number(high, 2)} in 95 % of shuffled labellings, all cells together.`)] : []));
      const labels = found.traits.map((name) => tl.plain(name));
      return [made.draw([{ type: "heatmap", x: labels, y: labels, z: found.aurocs, zmin: 0, zmax: 1, colorscale: colours.amountScale(), colorbar: colours.bar("AUROC"), hovertemplate: "%{y} on the examples of %{x}: %{z:.3~f}<extra></extra>" }],
        { title: "AUROC of each trait's vector (rows) on each trait's examples (columns)", xaxis: { tickangle: 30 }, yaxis: { autorange: "reversed" }, margin: { l: 150, r: 14, t: 30, b: 90 } })];
    }

    function drawHeats(state, found) {
      const rows = found.evaluation.rows;
      if (!rows) {
        heats.replaceChildren(found.evaluation.problem ? tl.warning(found.evaluation.problem) : tl.emptyState(new tl.source.Missing(found.evaluation.missing)));
        return [];
      }
      const components = Object.keys(found.components).filter((each) => rows.some((row) => (row.component ?? "residual") === each));
      const drawn = components.flatMap((component) => {
        const own = rows.filter((row) => (row.component ?? "residual") === component);
        const methods = [...new Set(own.map((row) => row.method))], layers = [...new Set(own.map((row) => row.layer))].sort((a, b) => a - b);
        const grid = (key) => methods.map((method) => layers.map((layer) => own.find((row) => row.method === method && row.layer === layer)?.[key] ?? null));
        const selected = found.components[component]?.selected;
        const at = selected ? [layers.indexOf(selected.layer), methods.indexOf(selected.method)] : [-1, -1];
        const shapes = at.includes(-1) ? [] : [{ type: "rect", x0: selected.layer - 0.5, x1: selected.layer + 0.5, y0: at[1] - 0.5, y1: at[1] + 0.5, line: { color: colours.css("--accent"), width: 2.5 } }];
        return [["val_effect_size", "effect size (Hedges' g)"], ["val_auroc", "AUROC"]].map(([key, label]) => {
          const made = figure(`${key}_${component}`, 164 + 34 * methods.length);
          // A row for what chance reaches: the best vector of shuffled labels, or in earlier files a random direction.
          const chance = ["null_auroc_p95", "random_auroc_p95"].map((field) => layers.map((layer) => own.find((row) => row.layer === layer)?.[field] ?? null));
          const compared = [["shuffled, p95", chance[0]], ["random, p95", chance[1]]].filter(([, values]) => key === "val_auroc" && values.some((value) => value !== null)).slice(0, 1);
          const range = key === "val_auroc" ? { zmin: 0.5, zmax: 1 } : { zmin: 0, zmax: Math.max(...own.map((row) => row[key]), 1e-9) };
          const job = made.draw([{ type: "heatmap", x: layers, y: [...methods, ...compared.map(([name]) => name)], z: [...grid(key), ...compared.map(([, values]) => values)], colorscale: colours.amountScale(), colorbar: colours.bar(label), ...range, hovertemplate: `%{y}, layer %{x}: %{z:.3~f}<extra></extra>` }],
            { title: `${component}: held-out ${label}`, xaxis: { title: "layer" }, margin: { l: 84, r: 14, t: 30, b: 38 }, shapes });
          return { element: made.element, job };
        });
      });
      heats.replaceChildren(...drawn.map((each) => each.element));
      return drawn.map((each) => each.job);
    }

    function drawCurves(found) {
      const { runs, baseline, chance, monitoring, problem } = found.steering;
      if (!runs) {
        curves.replaceChildren(problem ? tl.warning(problem) : tl.emptyState(new tl.source.Missing(found.steering.missing)));
        return [];
      }
      const groups = [...new Set(runs.map((run) => `${run.method}, layer ${run.layer}`))];
      const drawn = [["gain", "gain in trait_mean"], ["coherence_mean", "coherence"]].map(([key, label]) => {
        const made = figure(`steering_${key}`, 320);
        const traces = groups.map((group, number) => {
          const own = runs.filter((run) => `${run.method}, layer ${run.layer}` === group);
          const points = [[0, key === "gain" ? 0 : baseline[key], 0], ...own.map((run) => [run.coefficient, run[key], run.standard_error ?? 0])].sort((a, b) => a[0] - b[0]);
          const bars = key === "gain" ? { error_y: { type: "data", array: points.map(([, , error]) => error), thickness: 1, width: 2 } } : {};
          return { x: points.map(([x]) => x), y: points.map(([, y]) => y), ...bars, name: group, mode: "lines+markers", line: { color: colours.trait(groups, groups[number]) }, hovertemplate: `${tl.plain(group)}<br>coefficient %{x}: %{y:.1f}<extra></extra>` };
        });
        const nulls = key === "gain" ? runs.filter((run) => run.null) : [];
        if (nulls.length) traces.push({ x: nulls.flatMap((run) => [run.coefficient, run.coefficient, null]), y: nulls.flatMap((run) => [...run.null, null]), name: "random vectors, up to p95", mode: "lines", opacity: 0.4, line: { color: colours.css("--faint"), width: 9 }, hovertemplate: "random vectors<br>coefficient %{x}: %{y:+.1f}<extra></extra>" });
        const shapes = key === "coherence_mean" ? [tl.levelAt(70, colours.css("--faint"), "dot", 2)] : [];
        return { element: made.element, job: made.draw(traces, { title: `steering: ${label}`, xaxis: { title: "coefficient" }, yaxis: key === "gain" ? {} : { range: [0, 102] }, shapes, showlegend: traces.length > 1 && key === "gain", legend: { font: { size: 10 } } }) };
      });
      const beyond = chance === null ? "No random vectors were added, so these gains may be chance." : `Chance reaches ${tl.number(chance)} at the best of ${runs.length} cells, by random vectors at ${runs.filter((run) => run.null).length} of them; a larger gain selects a vector.`;
      const follows = monitoring.map((each) => `${each.method} at layer ${each.layer} ${tl.number(each.rank_correlation)} (random vectors up to ${tl.number(each.null)}, p = ${tl.number(each.p)})`).join("; ");
      const notes = [tl.note(`Gains over the unsteered model's ${tl.number(baseline.trait_mean)}, with standard errors over questions. ${beyond}`), follows ? tl.note(`Do projections of the responses, read without steering, follow the coefficient? Rank correlation: ${follows}.`) : null];
      curves.replaceChildren(...drawn.map((each) => each.element), element("div", {}, ...notes));
      return drawn.map((each) => each.job);
    }

    return {
      async update(state, changed) {
        if (!"view,experiment,trait,theme".split(",").some((key) => changed.has(key)) && figures.length) return;
        if (!state.trait) throw new tl.source.Missing({ what: `no trait vectors in ${state.experiment}`, command: await tl.source.command(`tlcapture extract --experiment ${state.experiment}`) });
        const found = await tl.source.vectors(state);
        const apart = found.evaluation.rows ? await tl.source.crossTraits(state, found.source).catch((missing) => ({ traits: [], missing })) : { traits: [] };
        figures.splice(0).forEach((each) => each.remove());
        chosen.replaceChildren(tl.note(`Vectors of ${found.trait} ${found.source === state.experiment ? `in ${state.experiment}` : "that come with the package"}; a frame marks the selected one.`),
          ...Object.entries(found.components).map(([component, each]) => why(component, each)), verdict(found.evaluation));
        await Promise.all([...drawHeats(state, found), ...drawMatrix(apart), ...drawCurves(found)]);
      },
      remove: () => figures.forEach((each) => each.remove()),
    };
  },
};
