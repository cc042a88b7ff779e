"use strict";
// Vectors: how well each method and layer separates held-out examples, how steering changes the model, which is selected and why.
tl.views.vectors = {
  title: "Vectors",
  withoutPrompt: true,
  create(container) {
    const { element, colours } = tl;
    const chosen = element("div"), heats = element("div", { className: "side-by-side" }), curves = element("div", { className: "side-by-side" });
    container.append(chosen, heats, element("hr"), curves);
    let figures = [];
    const figure = (name, height) => {
      const made = tl.figure({ name, height });
      figures.push(made);
      return made;
    };

    function why(component, found) {
      const { selected, runner_up: rival } = found;
      if (!selected) return element("p", { className: "warning" }, `${component}: ${found.problem}`);
      const reasons = {
        steering: "its steering run changes the trait most while the text stays coherent", effect_size: "it has the largest held-out effect size",
        fallback: "vectors have been neither evaluated nor steered", override: "it was requested",
      };
      const score = selected.score === null ? "" : `, ${tl.number(selected.score)}`;
      const next = rival ? ` Next: ${rival.method} at layer ${rival.layer}, ${tl.number(rival.score)}.` : "";
      const { imported } = found.metadata;
      const made = imported ? ` Imported from ${imported.file}, ${imported.convention ?? "attention outputs"}.` : found.metadata.extraction_model ? ` From ${found.metadata.extraction_model}, read at ${found.metadata.position ?? "an unknown position"}.` : " Unknown origin: no metadata.json.";
      return element("p", {}, element("b", {}, component), `: ${selected.method} at layer ${selected.layer}${score}, because ${reasons[selected.selected_by] ?? selected.selected_by}.${next}${made}`,
        selected.warning ? element("span", { className: "warning" }, ` ${selected.warning}.`) : null);
    }

    function drawHeats(state, found) {
      const rows = found.evaluation.rows;
      if (!rows) {
        heats.replaceChildren(found.evaluation.problem ? element("p", { className: "warning" }, found.evaluation.problem) : tl.emptyState(new tl.source.Missing(found.evaluation.missing)));
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
        return [["val_effect_size", "effect size (Cohen's d)"], ["val_auroc", "AUROC"]].map(([key, label]) => {
          const made = figure(`${key}_${component}`, 164 + 34 * methods.length);
          // A row for the 95th percentile of random directions, which every useful vector exceeds.
          const random = layers.map((layer) => own.find((row) => row.layer === layer)?.random_auroc_p95 ?? null);
          const compared = key === "val_auroc" && random.some((value) => value !== null) ? [["random, p95", random]] : [];
          const range = key === "val_auroc" ? { zmin: 0.5, zmax: 1 } : { zmin: 0, zmax: Math.max(...own.map((row) => row[key]), 1e-9) };
          const job = made.draw([{ type: "heatmap", x: layers, y: [...methods, ...compared.map(([name]) => name)], z: [...grid(key), ...compared.map(([, values]) => values)], colorscale: colours.amountScale(), colorbar: { thickness: 12 }, ...range, hovertemplate: `%{y}, layer %{x}: %{z:.3~f}<extra></extra>` }],
            { title: { text: `${component}: held-out ${label}`, font: { size: 13 } }, xaxis: { title: { text: "layer" } }, margin: { l: 84, r: 14, t: 30, b: 38 }, shapes });
          return { element: made.element, job };
        });
      });
      heats.replaceChildren(...drawn.map((each) => each.element));
      return drawn.map((each) => each.job);
    }

    function drawCurves(found) {
      const { runs, baseline, problem } = found.steering;
      if (!runs) {
        curves.replaceChildren(problem ? element("p", { className: "warning" }, problem) : tl.emptyState(new tl.source.Missing(found.steering.missing)));
        return [];
      }
      const groups = [...new Set(runs.map((run) => `${run.method}, layer ${run.layer}`))];
      const drawn = [["trait_mean", "trait"], ["coherence_mean", "coherence"]].map(([key, label]) => {
        const made = figure(`steering_${key}`, 320);
        const traces = groups.map((group, number) => {
          const own = runs.filter((run) => `${run.method}, layer ${run.layer}` === group);
          const points = [[0, baseline[key]], ...own.map((run) => [run.coefficient, run[key]])].sort((a, b) => a[0] - b[0]);
          return { x: points.map(([x]) => x), y: points.map(([, y]) => y), name: group, mode: "lines+markers", line: { color: colours.trait(groups, groups[number]) }, hovertemplate: `${tl.plain(group)}<br>coefficient %{x}: %{y:.1f}<extra></extra>` };
        });
        const shapes = key === "coherence_mean" ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 70, y1: 70, line: { dash: "dot", color: colours.css("--faint") } }] : [];
        return { element: made.element, job: made.draw(traces, { title: { text: `steering: ${label} (${key})`, font: { size: 13 } }, xaxis: { title: { text: "coefficient" } }, yaxis: { range: [0, 102] }, shapes, showlegend: groups.length > 1 && key === "trait_mean", legend: { font: { size: 10 } } }) };
      });
      curves.replaceChildren(...drawn.map((each) => each.element));
      return drawn.map((each) => each.job);
    }

    return {
      async update(state, changed) {
        if (![..."view,experiment,trait,theme".split(",")].some((key) => changed.has(key)) && figures.length) return;
        const found = await tl.source.vectors(state);
        figures.splice(0).forEach((each) => each.remove());
        chosen.replaceChildren(element("p", { className: "note" }, `Vectors of ${found.trait} in ${state.experiment}; a frame marks the selected one.`),
          ...Object.entries(found.components).map(([component, each]) => why(component, each)));
        await Promise.all([...drawHeats(state, found), ...drawCurves(found)]);
      },
      remove: () => figures.forEach((each) => each.remove()),
    };
  },
};
