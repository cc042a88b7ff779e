"use strict";
// Colours of values and traits. They are translucent, so that they work on light and dark backgrounds.
tl.colours = (() => {
  const POSITIVE = [214, 93, 14], NEGATIVE = [38, 110, 200], AMOUNT = [126, 70, 190], RANK = [20, 130, 110];
  const TRAITS = ["#d65d0e", "#2f7ed8", "#2a9d58", "#a34fb5", "#c43c50", "#1aa3a3", "#8a6d1f", "#7d7aea", "#d0569b", "#6b8e23"];

  const SPANS = { system: "#9467bd", user: "#1f77b4", assistant: "#17becf", tool: "#8c564b", thinking: "#e0a100", answer: "#2ca02c" };

  const over = ([r, g, b], alpha) => `rgba(${r}, ${g}, ${b}, ${alpha.toFixed(3)})`;
  const isNumber = (value) => value !== null && value !== undefined && Number.isFinite(value);

  /** The largest absolute value, without the first token, an attention sink that would dominate the scale. */
  function reach(values) {
    let largest = 0;
    values.slice(1).forEach((value) => { if (isNumber(value)) largest = Math.max(largest, Math.abs(value)); });
    return largest || 1;
  }

  return {
    reach,
    /** Blue below zero, orange above, saturated at `most`. */
    diverging: (value, most) => (isNumber(value) ? over(value < 0 ? NEGATIVE : POSITIVE, 0.7 * Math.min(1, Math.abs(value) / most)) : ""),
    /** Transparent at zero, saturated at `most`. */
    amount: (value, most = 1) => (isNumber(value) ? over(AMOUNT, 0.65 * Math.min(1, Math.max(0, value) / most)) : ""),
    /** As an amount, in the hue of ranks: strongest at rank 1, transparent at `most` and beyond. */
    rank: (value, most = 100000) => (isNumber(value) ? over(RANK, 0.65 * Math.max(0, 1 - Math.log(value) / Math.log(most))) : ""),
    /** The colour of a span's underline; undefined for one without. */
    span: (name) => SPANS[name],
    /** The 256 colours of amounts over the panel, from none to full, as red, green and blue. */
    ramp() {
      const back = tl.colours.numbers("--panel");
      return Array.from({ length: 256 }, (_, step) => back.map((value, part) => Math.round(value + (AMOUNT[part] - value) * (step / 255))));
    },
    trait: (traits, trait) => TRAITS[Math.max(0, traits.indexOf(trait)) % TRAITS.length],
    divergingScale: () => [[0, "rgb(38,110,200)"], [0.5, tl.colours.css("--panel")], [1, "rgb(214,93,14)"]],
    rankScale: () => [[0, "rgb(20,130,110)"], [1, tl.colours.css("--panel")]],
    amountScale: () => [[0, tl.colours.css("--panel")], [1, "rgb(126,70,190)"]],
    /** A colour bar with a title. */
    bar: (title, more = {}) => ({ thickness: 12, title: { text: title, side: "right", font: { size: 11 } }, ...more }),
    /** The scale of the text's colours, from its lowest to its highest value; `middle` is uncoloured. */
    scale(kind, low, high, middle) {
      const steps = { diverging: [tl.colours.diverging(-1, 1), "transparent", tl.colours.diverging(1, 1)], amount: ["transparent", tl.colours.amount(1)], rank: [tl.colours.rank(1), "transparent"] }[kind];
      const bar = tl.element("i", { style: { backgroundImage: `linear-gradient(to right, ${steps.join(", ")})` }, title: middle === undefined ? "" : `no colour at ${tl.number(middle, 3)}` });
      return tl.element("span", { className: "scale", role: "img", "aria-label": `colour scale from ${tl.number(low, 3)} to ${tl.number(high, 3)}` }, tl.number(low, 3), bar, tl.number(high, 3));
    },
    /** A colour of the style sheet as red, green and blue. */
    numbers: (name) => tl.colours.css(name).match(/[0-9.]+/g).slice(0, 3).map(Number),
    /** The current value, light or dark, of a colour of the style sheet. */
    css(name) {
      const probe = document.createElement("i");
      probe.style.color = `var(${name})`;
      document.body.append(probe);
      const found = getComputedStyle(probe).color;
      probe.remove();
      return found;
    },
  };
})();
