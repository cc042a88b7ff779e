"use strict";
// Compare two prompts, or the means of two prompt sets, of one or two experiments.
tl.views.compare = {
  title: "Compare",
  ownText: true,
  create(container) {
    const { element, colours } = tl;
    const COLOURS = ["#d65d0e", "#2f7ed8"];
    const pickers = element("div", { className: "side-by-side" }), texts = element("div", { className: "side-by-side" }), facts = element("div");
    const overlay = tl.figure({ name: "compare", height: 360, onClick: (point) => moveTo(point.x) });
    const sides = [0, 1].map(() => tl.figure({ name: "compare_side", height: 230, onClick: (point) => moveTo(point.x) }));
    container.append(pickers, overlay.element, element("div", { className: "side-by-side" }, sides.map((side) => side.element)), texts, facts);
    let start = 0, strips = [], found = [], marks = [];

    const moveTo = (position) => { if (position + start >= 0) tl.state.set({ token: position + start }); };

    /** What a side shows, and the names of its keys in the state. */
    const sideOf = (state, number) => (number === 0
      ? { experiment: state.experiment, set: state.set, prompt: state.prompt, average: state.average, keys: ["experiment", "set", "prompt", "average"] }
      : { experiment: state.experiment2 || state.experiment, set: state.set2 || state.set, prompt: state.prompt2 || state.prompt, average: state.average2, keys: ["experiment2", "set2", "prompt2", "average2"] });

    async function load(side, state) {
      const { trait, component } = state;
      const label = side.average ? `mean of ${side.experiment}/${side.set}` : `${side.experiment}/${side.set}/${side.prompt}`;
      if (side.average) {
        const mean = await tl.source.average(side.experiment, side.set, trait, component);
        return { label, x: mean.position, y: mean.mean, sd: mean.sd, n: mean.n, count: mean.n_captures, problems: mean.problems, calibration: mean.calibration };
      }
      const data = await tl.source.prompt(side);
      const own = data.projections.find((each) => each.trait === trait && each.component === component);
      if (!own) throw await tl.source.notProjected(data, { ...side, trait }, `${label}: `);
      return { label, x: own.trajectory.map((_, index) => index - data.n_prompt_tokens), y: own.trajectory, data, own, problems: data.problems, calibration: own.calibration };
    }

    async function pickersOf(side, experiments, number) {
      const [experiment, set, prompt, average] = side.keys;
      const here = experiments.find((each) => each.name === side.experiment);
      const sets = here ? here.prompt_sets : [];
      const prompts = await tl.source.promptSet(side.experiment, side.set).then((listed) => listed.prompts).catch(() => []);
      const later = number === 0 ? {} : { experiment2: side.experiment, set2: side.set, prompt2: side.prompt };
      return element("div", { className: "controls" },
        element("b", { className: "side", style: { borderColor: COLOURS[number] } }, number === 0 ? "A" : "B"),
        tl.picker("experiment", { options: experiments.map((each) => ({ value: each.name, text: each.name })), value: side.experiment, choose: (value) => tl.state.set({ ...later, [experiment]: value, [set]: "", [prompt]: "" }) }),
        tl.picker("set", { options: sets.map((each) => ({ value: each, text: each })), value: side.set, choose: (value) => tl.state.set({ ...later, [set]: value, [prompt]: "" }) }),
        side.average ? null : tl.picker("prompt", { options: prompts.map((each) => ({ value: each.id, text: `${each.id}`, note: tl.visible(each.text) })), value: side.prompt, choose: (value) => tl.state.set({ ...later, [prompt]: value }) }),
        tl.toggle("mean of the set", side.average, (on) => tl.state.set({ ...later, [average]: on })));
    }

    function tracesOf(side, number) {
      const colour = COLOURS[number], traces = [];
      if (side.sd) {
        const at = side.x.map((_, index) => index).filter((index) => side.sd[index] !== null);
        const edge = (sign) => at.map((index) => side.y[index] + sign * side.sd[index]);
        traces.push(tl.band(at.map((index) => side.x[index]), edge(-1), edge(1), colour, "one standard deviation"));
      }
      const text = side.x.map((position, index) => (side.data ? `${position} ${tl.plain(tl.quoted(side.data.labels[index]))}` : `${position}, ${side.n[index]} of ${side.count} captures, sd ${tl.number(side.sd[index], 3)}`));
      const y = side.data ? [null, ...side.y.slice(1)] : side.y; // the first token, an attention sink, is far off the scale
      traces.push({ x: side.x, y, text, mode: "lines", name: `${number === 0 ? "A" : "B"}: ${tl.plain(side.label)}`, line: { color: colour, width: 2.2 }, hovertemplate: `%{text}<br>%{y:.4~g}<extra></extra>` });
      return traces;
    }

    /** The values that determine the scale, without first tokens, which are attention sinks. */
    const onScale = (side) => (side.data ? side.y.slice(1).filter((value) => value !== null) : side.y.flatMap((mean, index) => [mean - (side.sd[index] ?? 0), mean + (side.sd[index] ?? 0)]));

    function drawTexts(state) {
      const most = Math.max(...found.filter((side) => side.data).map((side) => colours.reach(side.y)), 1e-9);
      strips = found.map((side) => {
        const box = element("div");
        if (!side.data) return { box: tl.note(`${side.label}: ${side.count} captures; the band is one standard deviation. First tokens, which are attention sinks, are excluded.`) };
        const strip = tl.strip(box, (index) => moveTo(index - side.data.n_prompt_tokens));
        strip.show(side.data.tokens, side.data.n_prompt_tokens, side.data.spans, side.data.joined);
        strip.paint((index) => colours.diverging(side.y[index], most), (index) => tl.number(side.y[index]));
        return { box, strip, side };
      });
      texts.replaceChildren(...strips.map(({ box }, number) => element("div", {}, element("b", { className: "side", style: { borderColor: COLOURS[number] } }, `${number === 0 ? "A" : "B"}: ${found[number].label}`), box)));
    }

    function drawFacts() {
      const rows = found.map((side, number) => {
        const response = side.y.filter((value, index) => value !== null && side.x[index] >= 0);
        const mean = response.reduce((sum, value) => sum + value, 0) / (response.length || 1);
        const own = side.own?.dynamics;
        return element("tr", {}, [number === 0 ? "A" : "B", response.length ? tl.number(mean) : "\u2013", own ? own.commitment_point ?? "none" : "\u2013", own ? tl.number(own.peak_velocity) : "\u2013", own ? own.persistence ?? "none" : "\u2013"].map((text) => element("td", {}, String(text))));
      });
      facts.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ["side", "mean over the response, as drawn", "commitment point", "peak velocity, not calibrated", "persistence"].map((text) => element("th", {}, text)))), element("tbody", {}, rows)),
        ...found.flatMap((side) => side.problems || []).map((problem) => tl.warning(problem)));
    }

    const here = (state) => (state.token === null ? [] : [tl.lineAt(state.token - start, colours.css("--accent"))]);

    function mark(state) {
      for (const { strip, side } of strips) strip?.choose(state.token === null ? -1 : state.token - start + side.data.n_prompt_tokens);
    }

    return {
      async update(state, changed, data) {
        if (found.length && [...changed].every((key) => ["token", "layer", "head"].includes(key))) {
          for (const each of [overlay, ...sides]) each.mark([...marks, ...here(state)]);
          return mark(state);
        }
        start = data ? data.n_prompt_tokens : 0;
        const experiments = await tl.source.experiments();
        const both = [0, 1].map((number) => sideOf(state, number));
        // By default, a side shows the first set and prompt.
        const second = both[1];
        const other = experiments.find((each) => each.name === second.experiment);
        if (other && !other.prompt_sets.includes(second.set)) second.set = other.prompt_sets[0] ?? "";
        const listed = second.set ? await tl.source.promptSet(second.experiment, second.set).then((each) => each.prompts.map((prompt) => prompt.id)) : [];
        if (!state.prompt2 || !listed.includes(second.prompt)) second.prompt = listed.find((id) => second.set !== state.set || second.experiment !== state.experiment || id !== state.prompt) ?? listed[0] ?? "";
        pickers.replaceChildren(...await Promise.all(both.map((side, number) => pickersOf(side, experiments, number))));
        found = await Promise.all(both.map((side) => load(side, state)));
        const calibrated = tl.isCalibrated(state, ...found);
        if (calibrated) {
          for (const side of found) {
            side.y = side.y.map((value) => tl.calibrated(side, value));
            if (side.sd) side.sd = side.sd.map((value) => (value === null ? null : value / Math.abs(side.calibration.positive_mean - side.calibration.negative_mean)));
          }
        }
        marks = [tl.lineAt(-0.5, colours.css("--faint"), "dash", 1)];
        const seen = found.flatMap(onScale), low = Math.min(...seen), high = Math.max(...seen), pad = (high - low || 1) * 0.07;
        const layout = (title) => ({
          title, xaxis: { title: "token, relative to the first response token" }, yaxis: { range: [low - pad, high + pad] }, shapes: [...marks, ...here(state)],
        });
        drawTexts(state);
        drawFacts();
        mark(state);
        await Promise.all([
          overlay.draw(found.flatMap(tracesOf), { ...layout(`${state.trait}, ${state.component}${calibrated ? ", calibrated: negative examples at 0, positive at 1" : ""}`), showlegend: true, legend: { orientation: "h", y: -0.32 } }),
          ...sides.map((side, number) => side.draw(tracesOf(found[number], number), layout(tl.plain(found[number].label)))),
        ]);
      },
      remove() {
        for (const each of [overlay, ...sides]) each.remove();
      },
    };
  },
};
