"use strict";
// Colours of values and traits. They are translucent, so that they work on light and dark backgrounds.
tl.colours = (() => {
  const POSITIVE = [214, 93, 14], NEGATIVE = [38, 110, 200], AMOUNT = [126, 70, 190];
  const TRAITS = ["#d65d0e", "#2f7ed8", "#2a9d58", "#a34fb5", "#c43c50", "#1aa3a3", "#8a6d1f", "#7d7aea", "#d0569b", "#6b8e23"];

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
    trait: (traits, trait) => TRAITS[Math.max(0, traits.indexOf(trait)) % TRAITS.length],
    divergingScale: () => [[0, "rgb(38,110,200)"], [0.5, tl.colours.css("--panel")], [1, "rgb(214,93,14)"]],
    amountScale: () => [[0, tl.colours.css("--panel")], [1, "rgb(126,70,190)"]],
    /** A colour bar with a title. */
    bar: (title, more = {}) => ({ thickness: 12, title: { text: title, side: "right", font: { size: 11 } }, ...more }),
    /** The scale of the text's colours, from its lowest to its highest value; `middle` is uncoloured. */
    scale(kind, low, high, middle) {
      const steps = kind === "diverging" ? [tl.colours.diverging(-1, 1), "transparent", tl.colours.diverging(1, 1)] : ["transparent", tl.colours.amount(1)];
      const bar = tl.element("i", { style: { backgroundImage: `linear-gradient(to right, ${steps.join(", ")})` }, title: middle === undefined ? "" : `no colour at ${tl.number(middle, 3)}` });
      return tl.element("span", { className: "scale", role: "img", "aria-label": `colour scale from ${tl.number(low, 3)} to ${tl.number(high, 3)}` }, tl.number(low, 3), bar, tl.number(high, 3));
    },
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
