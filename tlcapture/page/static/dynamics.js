"use strict";
// Trait dynamics: trajectories over the tokens, commitment points and persistence.
/** The projection onto the chosen trait and component. */
tl.projectionOf = (data, state) => data.projections.find((each) => each.trait === state.trait && each.component === state.component);

/** The peak of the smoothed response and the last token of its persistence; null where the rise is within chance. */
tl.persistenceOf = ({ peak, dynamics }) => (peak === null || peak === undefined ? null : [peak, peak + Math.max(dynamics.persistence, 1) - 1]);

/** A value on the scale of the vector's examples: the negative ones at 0, the positive ones at 1; null for a token that was not kept. */
tl.calibrated = ({ calibration }, value) => (value === null ? null : (value - calibration.negative_mean) / (calibration.positive_mean - calibration.negative_mean));

/** Whether a projection is shown on that scale. */
tl.isCalibrated = (state, ...projections) => state.calibrated && projections.every((each) => each.calibration);

tl.views.dynamics = {
  title: "Trait dynamics",
  create(container) {
    const { element, colours } = tl;
    const chips = element("div", { className: "chips" }), controls = element("div", { className: "controls" });
    const facts = element("div"), notes = element("div");
    const choose = (point) => tl.state.set({ token: point.x === undefined ? null : Math.round(point.x) });
    const lines = tl.figure({ name: "dynamics", height: 330, onClick: choose });
    const motion = tl.figure({ name: "velocity", height: 210, onClick: choose });
    container.append(controls, chips, lines.element, notes, facts, motion.element);
    let marks = [];

    const shownTraits = (state, all) => {
      const wanted = state.shown ? state.shown.split(",") : all;
      return all.filter((trait) => trait === state.trait || wanted.includes(trait));
    };

    /** Standard scores; mean and deviation exclude the first token. */
    function normalised(values) {
      const rest = values.slice(1).filter((value) => value !== null);
      const mean = rest.reduce((sum, value) => sum + value, 0) / (rest.length || 1);
      const sd = Math.sqrt(rest.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (rest.length || 1)) || 1;
      return values.map((value) => (value === null ? null : (value - mean) / sd));
    }

    /** The mean over the samples of the prompt, one standard deviation on either side, over the tokens of this sample. */
    function drawSpread(spread, data, own, calibrated, colour) {
      const width = calibrated ? Math.abs(own.calibration.positive_mean - own.calibration.negative_mean) : 1;
      const mean = spread.mean.map((value) => (calibrated ? tl.calibrated(own, value) : value)), x = spread.position.map((position) => position + data.n_prompt_tokens);
      const at = x.map((_, index) => index).filter((index) => spread.sd[index] !== null);
      const edge = (sign) => at.map((index) => mean[index] + (sign * spread.sd[index]) / width);
      return [
        tl.band(at.map((index) => x[index]), edge(-1), edge(1), colour, "one standard deviation over samples"),
        { x, y: mean, text: spread.n.map((n) => `${n} of ${spread.n_captures} samples`), mode: "lines", name: "mean over samples", line: { color: colour, width: 1.6, dash: "dash" }, hovertemplate: "%{text}<br>mean %{y:.4~g}<extra></extra>" },
      ];
    }

    function drawLines(state, data, projections, all, spread) {
      const number = (value) => tl.number(value), shown = shownTraits(state, all);
      const hover = tl.numbered(data.labels);
      const ofShown = projections.filter((each) => shown.includes(each.trait));
      const calibrated = !state.normalise && tl.isCalibrated(state, ...ofShown);
      const scaled = (each) => (state.normalise ? normalised(each.trajectory) : calibrated ? each.trajectory.map((value) => tl.calibrated(each, value)) : each.trajectory);
      const values = new Map(ofShown.map((each) => [each.trait, scaled(each)]));
      const traces = ofShown.map((each) => ({
        x: data.tokens.map((_, index) => index), y: values.get(each.trait), text: hover, name: each.trait, mode: "lines",
        line: { color: colours.trait(all, each.trait), width: each.trait === state.trait ? 3 : 1.3 },
        opacity: each.trait === state.trait ? 1 : 0.75,
        hovertemplate: `%{text}<br>${tl.plain(each.trait)} %{y:.4~g}<extra></extra>`,
      }));
      const committed = ofShown.filter((each) => each.dynamics.commitment_point !== null && each.dynamics.commitment_point !== undefined);
      traces.push({
        x: committed.map((each) => each.dynamics.commitment_point), y: committed.map((each) => values.get(each.trait)[each.dynamics.commitment_point]),
        text: committed.map((each) => `${tl.plain(each.trait)} commits at ${each.dynamics.commitment_point}`), mode: "markers", name: "commitment point",
        marker: { symbol: "diamond", size: 11, color: committed.map((each) => colours.trait(all, each.trait)), line: { color: colours.css("--panel"), width: 1.5 } },
        hovertemplate: "%{text}<extra></extra>",
      });
      const persisting = ofShown.filter((each) => tl.persistenceOf(each));
      for (const each of persisting) {
        const [peak, last] = tl.persistenceOf(each), color = colours.trait(all, each.trait);
        traces.push({
          x: data.tokens.map((_, index) => index).slice(peak, last + 1), y: values.get(each.trait).slice(peak, last + 1), mode: "lines+markers", name: "persists",
          line: { color, width: 8 }, marker: { color, size: 8 }, opacity: 0.35, hoverinfo: "skip",
        });
      }
      const own = ofShown.find((each) => each.trait === state.trait);
      const ofSamples = own && spread && !state.normalise ? drawSpread(spread, data, own, calibrated, colours.trait(all, own.trait)) : [];
      traces.unshift(...ofSamples);
      marks = [tl.lineAt(data.n_prompt_tokens - 0.5, colours.css("--faint"), "dash", 1)];
      if (calibrated) marks.push(tl.levelAt(0.5, colours.css("--faint"), "dot"));
      const seen = [...[...values.values()].flatMap((line) => line.slice(state.response ? data.n_prompt_tokens : 1)), ...ofSamples.flatMap((trace) => trace.y)].filter((value) => value !== null);
      const low = Math.min(...seen), high = Math.max(...seen), pad = (high - low || 1) * 0.07;
      notes.replaceChildren();
      const off = ofShown.filter((each) => { const first = values.get(each.trait)[0]; return first !== null && (first < low - pad || first > high + pad); });
      for (const trace of traces) if (off.some((each) => each.trait === trace.name)) trace.y = [null, ...trace.y.slice(1)];
      if (off.length) {
        const listed = off.map((each) => `${each.trait} ${number(values.get(each.trait)[0])}`).join(", ");
        notes.append(tl.note(`The first token, an attention sink, is off the scale: ${listed}.`));
      }
      const meant = [...(committed.length ? ["diamond: commits"] : []), ...(persisting.length ? ["thick: persists from the peak of the smoothed response"] : [])];
      if (meant.length) notes.append(element("p", { className: "note", id: "marks" }, `Dashed: the response begins; ${meant.join("; ")}.`));
      const kept = ofShown.find((each) => each.kept)?.kept;
      if (ofSamples.length) {
        const over = (value) => (calibrated ? tl.calibrated(own, value) : value), scale = calibrated ? Math.abs(own.calibration.positive_mean - own.calibration.negative_mean) : 1;
        const sd = spread.response_sd === null ? "" : ` \u00b1 ${number(spread.response_sd / scale)}`;
        const text = spread.response_mean === null ? "" : `; the mean over the response is ${number(over(spread.response_mean))}${sd}`;
        notes.append(element("p", { className: "note", id: "spread" }, `Dashed: the mean over ${spread.n_captures} samples of this prompt, with one standard deviation${text}.`));
        notes.append(...spread.problems.map((problem) => tl.warning(problem)));
      }
      if (kept) notes.append(tl.note(`Of this capture, ${kept}.`));
      return lines.draw(traces, {
        title: state.normalise ? "projection, in standard deviations of each trajectory" : calibrated ? "projection, calibrated: negative examples at 0, positive at 1" : "projection h\u00b7v / \u2016v\u2016",
        xaxis: { title: "token", range: [-0.5, data.tokens.length - 0.5] }, yaxis: seen.length ? { range: [low - pad, high + pad] } : {},
        shapes: [...marks, ...here(state)],
      });
    }

    function drawMotion(state, data, own) {
      const afterSink = (values) => values.map((value, index) => (index ? value : null)); // the first token, an attention sink, is in the first
      const velocity = afterSink(own.dynamics.velocity), acceleration = afterSink(own.dynamics.acceleration);
      const trace = (values, offset, name, dash) => ({
        x: values.map((_, index) => index + offset), y: values, name, mode: "lines", line: { dash, width: 1.6, color: colours.css(dash === "solid" ? "--accent" : "--faint") },
        hovertemplate: `token %{x}<br>${name} %{y:.4~g}<extra></extra>`,
      });
      const from = state.response ? Math.max(1, data.n_prompt_tokens - 2) : 1, seen = [...velocity.slice(from), ...acceleration.slice(from)];
      const reach = Math.max(...seen.map(Math.abs), 1e-9) * 1.07;
      return motion.draw([trace(velocity, 1, "velocity", "solid"), trace(acceleration, 2, "acceleration", "dot")], {
        title: `${state.trait}: velocity (line) and acceleration (dots)`,
        xaxis: { title: "token", range: [-0.5, data.tokens.length - 0.5] }, yaxis: { range: [-reach, reach] },
        shapes: [marks[0], ...here(state)],
      });
    }

    const here = (state) => (state.token === null ? [] : [tl.lineAt(state.token, colours.css("--accent"))]);

    /** The mean over each turn, over thinking and over the answer, on the scale of the text's colours. */
    function meansOf(state, own) {
      const known = (own.dynamics.by_span ?? []).filter(({ mean }) => mean !== null && mean !== undefined), calibrated = tl.isCalibrated(state, own);
      const text = known.map(({ kind, role, mean }) => `${kind === "turn" ? role : kind} ${tl.number(calibrated ? tl.calibrated(own, mean) : mean)}`).join(", ");
      return text ? [tl.note(`Means${calibrated ? ", calibrated" : ""}: ${text}.`)] : [];
    }

    function tell(state, data, own) {
      const { dynamics, vector } = own;
      const point = dynamics.commitment_point;
      const span = tl.persistenceOf(own), { chance } = own;
      const p = dynamics.commitment_p === null || dynamics.commitment_p === undefined ? "" : ` (p ${tl.number(dynamics.commitment_p)})`;
      const unknown = own.kept && dynamics.peak_velocity === null; // projected again, without the tokens that were not kept
      const commits = (point === null || point === undefined ? (unknown && !p ? "its commitment needs tokens that were not kept" : "does not commit") : `commits at ${point} ${tl.quoted(data.labels[point])}`) + p;
      const persists = span ? `persists ${dynamics.persistence} tokens, ${span[0]} to ${span[1]}` : own.kept && dynamics.persistence !== null ? `persists ${dynamics.persistence} tokens`
        : unknown ? "its persistence needs tokens that were not kept" : "its rise is within chance";
      const clear = (share, found) => (found ? (share <= 0.05 ? ", clearer than 95 %" : ", not clearer than 95 %") : "");
      const random = chance ? ` Of ${chance.n_directions} random directions ${chance.commit} commit${clear(chance.commitment, point !== null)}${chance.persist === null ? "" : `, ${chance.persist} persist${clear(chance.persistence, span)}`}.` : "";
      const score = vector.score === null || vector.score === undefined ? "" : ` (${tl.number(vector.score)})`;
      facts.replaceChildren(
        tl.note(element("b", {}, state.trait), `: ${commits} (`, tl.term("commitment"), "); peak ", tl.term("velocity"), ` ${tl.number(dynamics.peak_velocity)}${tl.isCalibrated(state, own) ? ", not calibrated" : ""}; `
          + `${persists} (`, tl.term("persistence"), `).${random} Vector: ${vector.method ?? "unknown method"} at layer ${vector.layer}, ${vector.component ?? own.component}, chosen by `, tl.term(vector.selected_by ?? "an unknown rule"), `${score}, from ${vector.experiment ?? "an unknown experiment"} (${vector.model ?? "unknown model"}).`),
        ...meansOf(state, own),
        ...own.warnings.map((warning) => tl.warning(warning)));
    }

    return {
      async update(state, changed, data) {
        const projections = data.projections.filter((each) => each.component === state.component);
        const all = [...new Set(data.projections.map((each) => each.trait))].sort();
        const own = tl.projectionOf(data, state);
        if (!own) throw await tl.source.notProjected(data, state);
        const line = tl.isCalibrated(state, own) ? own.trajectory.map((value) => tl.calibrated(own, value)) : own.trajectory;
        const middle = line === own.trajectory ? 0 : 0.5, fromMiddle = line.map((value) => (value === null ? null : value - middle));
        tl.reading.paint((index) => colours.diverging(fromMiddle[index], colours.reach(fromMiddle)), (index) => tl.number(line[index]), `${state.trait}`, colours.scale("diverging", middle - colours.reach(fromMiddle), middle + colours.reach(fromMiddle), middle));
        if ([...changed].every((key) => key === "token" || key === "layer" || key === "head")) {
          lines.mark([...marks, ...here(state)]);
          motion.mark([marks[0], ...here(state)]);
          return;
        }
        const shown = shownTraits(state, all);
        chips.replaceChildren(...all.map((trait) => element("button", {
          "aria-pressed": shown.includes(trait) ? "true" : "false", title: "show or hide; double-click to choose this trait",
          onclick: () => { const next = shown.includes(trait) ? shown.filter((each) => each !== trait) : [...shown, trait]; tl.state.set({ shown: next.join(",") || state.trait }, { quietly: true }); },
          ondblclick: () => tl.state.set({ trait }),
        }, element("i", { style: { background: colours.trait(all, trait) } }), trait)));
        controls.replaceChildren(
          tl.toggle("normalise for comparison", state.normalise, (on) => tl.state.set({ normalise: on })),
          tl.toggle("calibrated", state.calibrated, (on) => tl.state.set({ calibrated: on })),
          element("button", { onclick: () => tl.state.set({ shown: "" }, { quietly: true }) }, "all traits"),
          element("button", { onclick: () => tl.state.set({ shown: state.trait }, { quietly: true }) }, "this trait only"));
        tell(state, data, own);
        const { prompts } = await tl.source.promptSet(state.experiment, state.set), samples = tl.samplesWith(prompts, state.prompt);
        if (samples) controls.append(tl.toggle("mean of samples", state.spread, (on) => tl.state.set({ spread: on })));
        const spread = samples && state.spread ? await tl.source.samples(state, samples.id) : null;
        await Promise.all([drawLines(state, data, projections, all, spread), drawMotion(state, data, own)]);
      },
      remove() {
        lines.remove();
        motion.remove();
      },
    };
  },
};
